"""eBPF without a compiler: instructions from names, the kernel's own description of its types, and the system calls.

    assembler   names and labels ─▶ instructions                pure
    btf         the kernel's types: where a member is           pure
    kernel      maps, programs, where they are attached         bpf(2)

A program here is a page long and changes with the node that it is for, so it is put together where it is used: no
compiler on the node, none in the image, and no copy of the kernel's headers that could be another kernel's.
"""
