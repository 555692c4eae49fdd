"""How an exported update may be laid out. Apart from the other types: it imports nothing heavy."""

from __future__ import annotations

from typing import Literal

ExportForm = Literal["whole", "plain", "linears"]
"""What the reader of an exported adapter can take.

- `whole`: all of the update; the shift needs `lora_bias`, which PEFT has and servers have not.
- `plain`: LoRA alone, the head's too; leaves the shift out. What vLLM takes.
- `linears`: for readers without LoRA on the LM head; leaves out all that acts there.
"""
