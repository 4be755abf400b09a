"""Entangle, the virtual machine: programs in, exact results out, on any machine.

The folders follow the chapters of a language specification:

    syntax/     text, the seed's JSON dialect, the canonical encoding, the one instruction table
    valid/      the verifier: control-flow graph, stack and types, the gas plan
    interpret/  the reference interpreter, which is the meaning of every instruction
    compile/    verified programs to WebAssembly text
    runtime/    running blocks of indices, reductions, partial results

This package imports nothing of the kernel, and importing it loads neither wasmtime nor numpy.
"""
