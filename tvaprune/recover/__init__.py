"""Any model towards a teacher: `job` loads what one fine-tuning needs, `teacher`, `lora` and `trainer` do it."""
