"""What other libraries need to know of packed weights, and what is known here of theirs.

``import lowbit_rs`` imports none of this. It leaves a note in Python's import system, and once transformers or PEFT has
been imported, before or after, the module for it follows (``lowbit_rs._post_import``):

- ``transformers``: ``LowbitConfig`` for ``from_pretrained``, and the loading of models that were saved with it;
- ``peft``: LoRA layers that can be merged into packed weights.

``checkpoints`` reads and writes the layouts of other quantizers, ``pretrained`` makes models of such files.
"""
