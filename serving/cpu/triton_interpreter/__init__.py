"""A Triton backend for the CPU that is only there: kernels run in Triton's own interpreter.

vLLM's newer model runner is written in Triton and wants an active backend. With TRITON_INTERPRET=1
no kernel is compiled and nothing here is called but `is_active`.
"""
