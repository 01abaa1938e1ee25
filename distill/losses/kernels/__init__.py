"""Triton kernels for the losses on CUDA: the same numbers as the torch code, the reference, in a few launches.

    launch    launches compiled kernels with little host overhead
    keys      integer keys in the order of floats; the contexts of a pixel
    select    medians and mean deviations of all contexts of both maps
    digits    its passes over the pixels
    picks     its work per context between those passes
    small     the same for small maps, in one launch
    contexts  the loss in contexts
    gradient  the multi-scale gradient loss

All kernels are float32, never wait for the host, can be captured in a CUDA graph, and are bitwise deterministic. Only
`distill.losses.fused` calls them: it decides when, and imports Triton only then.
"""
