"""Write a tiny model and tiny data sets into a folder, for recipes to train: everything runs offline in seconds.

    python examples/tiny_folder.py [FOLDER]        default: out/tiny

FOLDER/model, FOLDER/data.json (64 records in LLaVA's format), FOLDER/eval.json (12) and their images. The same as
``seecal tiny-folder [FOLDER]``, which works without the checkout.
"""

import sys

from seecal.recipes import tiny_folder

if __name__ == "__main__":
    print(f"{tiny_folder(*sys.argv[1:2])}: model, data.json, eval.json")
