"""Print the ids of a prompt by both CLIP tokenizers of transformers 4, as JSON by class."""

import json
import sys

from transformers import CLIPTokenizer, CLIPTokenizerFast


def main() -> None:
    """Run ``tokens.py FOLDER PROMPT``."""
    folder, prompt = sys.argv[1:]
    ids = {}
    for kind in (CLIPTokenizer, CLIPTokenizerFast):
        tokenizer = kind.from_pretrained(folder)
        length = tokenizer.model_max_length
        encoded = tokenizer(prompt, padding="max_length", truncation=True, max_length=length)
        ids[kind.__name__] = encoded.input_ids
    print(json.dumps(ids))


if __name__ == "__main__":
    main()
