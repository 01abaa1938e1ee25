"""Triton kernels for the losses on CUDA: the numbers of the torch code, which stays the reference, in a few launches.

    launch    a compiled kernel, launched with little work of the host
    keys      floats in the order of integers; the contexts of a pixel
    select    medians and mean deviations of all contexts of both maps
    digits    its passes over the pixels
    picks     what it does with each context in between
    small     the same of small maps, one launch
    contexts  the loss in contexts
    gradient  the multi-scale gradient loss

All is float32, never waits on the host, can be captured in a CUDA graph, and gives the same bits every time. Only
`distill.losses.fused` calls them: it decides when, and imports Triton no sooner.
"""
