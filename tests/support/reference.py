"""CAL written as the paper's equations, as loops, and how gradients are compared."""

import torch

from tests.support.builders import IMAGE


def by_the_equations(model, batch, alpha=1.0, beta=5.0, window=3):
    """(loss with gradients, weights): the paper's equations as loops over samples and label tokens, one sample a time."""
    numerator, weights = 0.0, []
    for row in range(len(batch["input_ids"])):
        ids, labels, mask = (batch[name][row : row + 1] for name in ("input_ids", "labels", "attention_mask"))
        images_before = int((batch["input_ids"][:row] == IMAGE).sum()) // 16
        images = int((ids == IMAGE).sum()) // 16
        pixels = {"pixel_values": batch["pixel_values"][images_before : images_before + images]} if images else {}
        with_image = model(input_ids=ids, attention_mask=mask, use_cache=False, **pixels).logits[0].float()
        with torch.no_grad():
            hidden_image = mask * (ids != IMAGE)
            without = model(input_ids=ids, attention_mask=hidden_image, use_cache=False, **pixels).logits[0].float()
        run = []
        for column in [*range(1, ids.shape[1]), None]:
            labelled = column is not None and labels[0, column] != -100
            if run and not labelled:
                clamped = [delta for delta, _ in run]
                for j, (_, ce) in enumerate(run):
                    near = clamped[max(0, j - window // 2) : j + window // 2 + 1]
                    weights.append(sum(near) / len(near))
                    numerator = numerator + weights[-1] * ce
                run = []
            if labelled:
                target = labels[0, column]
                seen = bool((ids[0, : column - 1] == IMAGE).any()) and bool(ids[0, column - 1] != IMAGE)
                delta = float(with_image[column - 1, target].detach() - without[column - 1, target]) if seen else 0.0
                ce = torch.logsumexp(with_image[column - 1], 0) - with_image[column - 1, target]
                run.append((min(max(delta, alpha), beta), ce))
    return numerator / sum(weights), torch.tensor(weights)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(got, expected, relative):
    assert set(got) == set(expected)
    # some are 0 but for rounding (the bias of a key projection): the largest one says what 0 is
    floor = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= relative * max(float(gradient.norm()), floor), name
