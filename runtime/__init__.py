"""The engine: checkpoints, tokenizer, plan, arena, cache, model, decode loop. Knows no text similarity."""
