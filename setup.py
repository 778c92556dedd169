"""Packaging that pyproject.toml cannot state: dependencies that follow the torch the package is built against."""

from setuptools import setup

setup(
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16,<0.20",
        "transformers>=4.56",
        "safetensors>=0.4.5",
        "tokenizers>=0.21",
        "sentencepiece>=0.2",
        "gigatoken>=0.10",
        "numpy>=1.26",
        "tensorboard>=2.17",
        "tqdm>=4.66",
        "packaging",
        "psutil",
    ]
)
