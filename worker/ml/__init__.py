"""The recipe: tokenizer, data, base, adapters, trainer. Knows no job folder and no supervisor."""
