"""The words that prompts are made of, as plain lists: each generator keeps those that suit the model's tokenizer."""
