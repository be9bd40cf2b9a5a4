"""What was selected becomes a weights bundle; nnU-Net's folders become one, and bundles them.

In come checkpoints and ``selection.json``, or a trained nnU-Net v2 folder; out come ``model.json``,
safetensors files and a model card. Open ``export`` first.
"""
