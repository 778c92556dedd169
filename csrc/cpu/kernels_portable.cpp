// The kernels without special instructions, for every processor.
#define MASKLLM_ISA Portable
#define MASKLLM_TARGET 
#include "kernels.inl"
