"""What connects lowbit_rs with other libraries; nothing here is loaded by ``import lowbit_rs``."""
