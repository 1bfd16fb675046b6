"""Print the ids of a prompt as both tokenizers of transformers 4 read a folder: JSON, by class."""

import json
import sys

from transformers import CLIPTokenizer, CLIPTokenizerFast


def main() -> None:
    """tokens.py FOLDER PROMPT"""
    folder, prompt = sys.argv[1:]
    ids = {}
    for kind in (CLIPTokenizer, CLIPTokenizerFast):
        tokenizer = kind.from_pretrained(folder)
        length = tokenizer.model_max_length
        found = tokenizer(prompt, padding="max_length", truncation=True, max_length=length)
        ids[kind.__name__] = found.input_ids
    print(json.dumps(ids))


if __name__ == "__main__":
    main()
