"""The CPU runtime of our own: kernels in C++ whose result for a row never depends on the other rows.

`library` finds the compiled core and its instruction set, `linear` packs and multiplies, `stack` runs decoder
layers. docs/NUMERICS.md says why the results are what they are.
"""
