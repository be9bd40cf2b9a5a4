"""What a weights bundle says: plans, the network's architecture, and tensors.

In comes a folder with ``model.json`` and safetensors files; out come frozen dataclasses and state
dicts, checked against their sha256. Nothing is unpickled. Open ``plans`` first, then ``bundle``;
``network`` is built from ``architecture``; ``strict_json`` reads and writes every JSON file that
this project reads back.
"""
