"""The whole pipeline in one command: `maskllm quickstart`."""
