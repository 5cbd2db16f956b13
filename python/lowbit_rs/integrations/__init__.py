"""What other libraries need to know of packed weights.

``import lowbit_rs`` imports none of this. It leaves a note in Python's import system, and once transformers or PEFT has
been imported, before or after, the module for it follows (``lowbit_rs._post_import``):

- ``transformers``: ``LowbitConfig`` for ``from_pretrained``, and the loading of models that were saved with it;
- ``peft``: LoRA layers that can be merged into packed weights.
"""
