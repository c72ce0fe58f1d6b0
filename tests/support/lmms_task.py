"""What seecal_colours.yaml names."""


def visuals(doc):
    """None, one or several images."""
    return [image.convert("RGB") for image in doc["images"]]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def scored(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
