# MaskLLM on NVIDIA's PyTorch container, with the CUDA kernels for A100 (8.0), A10/RTX 30 (8.6), L40/RTX 40 (8.9), H100/H200 (9.0) and B200 (10.0).
#
#   docker build -t maskllm .
#   docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 --user "$(id -u):$(id -g)" -e HOME=/workspace -v "$PWD:/workspace" maskllm
#
# 26.05 has Ubuntu 24.04, Python 3.12, CUDA 13.2, Transformer Engine and PyTorch 2.12, the first whose torchrun can be told how long a job
# that is asked to stop may save. Its PyTorch is NVIDIA's own build and is kept: the kernels are built against it, and the image's list of
# versions (PIP_CONSTRAINT) holds for what is installed beside it.
FROM nvcr.io/nvidia/pytorch:26.05-py3

# PYTHONSAFEPATH: a checkout that is mounted as the working directory must not take the place of the package and its kernels.
ENV TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0;10.0" \
    MASKLLM_BUILD_CUDA=1 \
    PYTHONSAFEPATH=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/maskllm
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY maskllm maskllm
COPY megatron_patches megatron_patches
COPY tools tools
COPY examples examples

# The tools that build the package may be newer than the image's list has them.
RUN PIP_CONSTRAINT="" pip install "setuptools>=77" "wheel>=0.45" "ninja>=1.11" "pybind11>=2.13"
RUN before=$(python -c "import torch; print(torch.__version__, torch.__file__)") \
    && pip install --no-build-isolation . \
    && test "$(python -c "import torch; print(torch.__version__, torch.__file__)")" = "$before" \
    && rm -rf build ./*.egg-info

RUN useradd --create-home --uid 10001 maskllm && install --directory --owner 10001 /workspace
USER 10001
WORKDIR /workspace

# Says what this container has, and stops there if that is not enough to train.
ENTRYPOINT ["/bin/bash", "-c", "maskllm doctor >&2 && exec \"$@\"", "maskllm"]
CMD ["bash"]
