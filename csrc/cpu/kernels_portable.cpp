// The kernels in instructions that every processor of the architecture has.
#define MASKLLM_ISA Portable
#define MASKLLM_ISA_NAME "portable"
#define MASKLLM_TARGET 
#include "kernels.inl"
