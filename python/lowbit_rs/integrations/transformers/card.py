"""What a model card on the Hub says about packed weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The first line finds the note again when a model is pushed a second time.
NOTE = """## Weights in low precision

The weights of this model are packed by [lowbit_rs](https://pypi.org/project/lowbit-rs/). Import it before loading them;
without that, transformers does not know how to read the packed weights.

```python
import lowbit_rs
from transformers import {kind}

model = {kind}.from_pretrained("{name}")
```
"""


def add_note(path: Path, name: str, kind: str) -> None:
    """Adds the note to the model card ``path``, unless it is there: the model is called ``name``, of class ``kind``."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    note = NOTE.format(name=name, kind=kind)
    if note.splitlines()[0] not in text:
        path.write_text(f"{text.rstrip()}\n\n{note}".lstrip(), encoding="utf-8")


def upload_with_note(model: PreTrainedModel, working_dir: str, repo_id: str, *arguments: Any, **keywords: Any) -> Any:
    """``_upload_modified_files`` of a packed model, which every way of pushing to the Hub ends in."""
    add_note(Path(working_dir) / "README.md", repo_id, type(model).__name__)
    return type(model)._upload_modified_files(model, working_dir, repo_id, *arguments, **keywords)
