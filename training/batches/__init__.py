"""Stored cases become augmented batches on the training device, ahead of their use.

In come the store and a key (seed, fold, epoch, index), which alone decides a batch; out come
tensors ``(B, C, Z, Y, X)``. ``sampling`` draws, ``reading`` reads, ``augmentation`` describes what
is changed, and ``augment_host`` or ``augment_device`` changes it. Open ``sampling`` first, then
``stream``.
"""
