"""Conversion between text and tokens: tokenizer, incremental detokenizer, chat templates, constraints and guards."""
