# MaskLLM on NVIDIA's PyTorch container, with the CUDA kernels for A100 (8.0), A10/RTX 30 (8.6), L40/RTX 40 (8.9), H100/H200 (9.0) and B200 (10.0).
#
#   docker build -t maskllm .
#   docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 --user "$(id -u):$(id -g)" -e HOME=/workspace -v "$PWD:/workspace" maskllm
#
# 26.05 has Ubuntu 24.04, Python 3.12, CUDA 13.2, Transformer Engine and PyTorch 2.12. Since that version of PyTorch torchrun has a setting
# for how long a job may save after SIGTERM. This file keeps the image's PyTorch, which is NVIDIA's own build: the kernels are built against
# it, and the image's list of versions (PIP_CONSTRAINT) applies to the packages installed beside it.
FROM nvcr.io/nvidia/pytorch:26.05-py3

# PYTHONSAFEPATH: Python must import the installed package with its kernels, not a checkout that is mounted as the working directory.
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

# The build tools may have to be newer than the versions in the image's list, so this line ignores the list.
RUN PIP_CONSTRAINT="" pip install "setuptools>=77" "wheel>=0.45" "ninja>=1.11" "pybind11>=2.13"
RUN before=$(python -c "import torch; print(torch.__version__, torch.__file__)") \
    && pip install --no-build-isolation . \
    && test "$(python -c "import torch; print(torch.__version__, torch.__file__)")" = "$before" \
    && rm -rf build ./*.egg-info

RUN useradd --create-home --uid 10001 maskllm && install --directory --owner 10001 /workspace
USER 10001
WORKDIR /workspace

# The container prints what it has, and stops if that is not enough to train.
ENTRYPOINT ["/bin/bash", "-c", "maskllm doctor >&2 && exec \"$@\"", "maskllm"]
CMD ["bash"]
