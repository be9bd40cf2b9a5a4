"""Stored cases become augmented batches on the training device, ahead of their use.

In come the store and a key (seed, fold, epoch, index), which alone decides a batch; out come
tensors ``(B, C, Z, Y, X)``. ``augmentation`` describes what is drawn; ``augment_host`` and
``augment_device`` do it. Open ``sampling`` first, then ``stream``.
"""
