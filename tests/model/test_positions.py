"""Which token attends to what, and predicts what: as stock has it, or refused."""

from typing import Any

import pytest
import torch

from tests.tiny import VOCABULARY, gradients, tiny_model
from xplus_fast import prepare_model
from xplus_fast.data.packed import PackCollator
from xplus_fast.errors import UserError

CLOSE = 2e-5
S = 12


def ids(rows: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(rows)
    return torch.randint(1, VOCABULARY, (rows, S), generator=g)


def positions(*runs: tuple[int, int]) -> torch.Tensor:
    """A row of positions: runs of (first, how many)."""
    return torch.cat([torch.arange(first, first + n) for first, n in runs])[None]


def without(labels: torch.Tensor, *places: tuple[int, slice]) -> torch.Tensor:
    labels = labels.clone()
    for row, columns in places:
        labels[row, columns] = -100
    return labels


ONE, TWO = ids(1), ids(2)
HOLE = torch.tensor([[1] * 4 + [0] * 2 + [1] * 6, [1] * S])
LEFT = torch.tensor([[0] * 3 + [1] * 9, [1] * S])
ALIKE: dict[str, dict[str, torch.Tensor]] = {
    "rows": {"input_ids": TWO, "labels": TWO},
    "positions that restart": {
        "input_ids": ONE, "labels": ONE, "position_ids": positions((0, 5), (0, 7)),
    },
    "positions that jump, no mask": {
        "input_ids": ONE, "labels": ONE, "position_ids": positions((0, 5), (40, 7)),
    },
    "positions that jump beside a mask (PoSE)": {
        "input_ids": ONE, "labels": ONE, "position_ids": positions((0, 5), (40, 7)),
        "attention_mask": torch.ones(1, S),
    },
    "positions that jump in a padded row": {
        "input_ids": TWO, "position_ids": positions((0, 5), (40, 7)).expand(2, -1),
        "attention_mask": torch.tensor([[1] * 9 + [0] * 3, [1] * S]),
        "labels": without(TWO, (0, slice(9, S))),
    },
    "positions of several rows": {
        "input_ids": TWO, "labels": TWO,
        "position_ids": torch.cat([positions((0, 5), (0, 7)), positions((0, S))]),
    },
    "positions that begin late": {
        "input_ids": ONE, "labels": ONE, "position_ids": positions((7, S)),
    },
    "right padding": {
        "input_ids": TWO, "attention_mask": torch.tensor([[1] * 9 + [0] * 3, [1] * S]),
        "labels": without(TWO, (0, slice(9, S))),
    },
    "left padding, its first token unlabelled": {
        "input_ids": TWO, "attention_mask": LEFT, "labels": without(TWO, (0, slice(0, 4))),
    },
    "left padding with positions of its own": {
        "input_ids": TWO, "attention_mask": LEFT, "labels": without(TWO, (0, slice(0, 4))),
        "position_ids": (LEFT.cumsum(1) - 1).clamp(min=0),
    },
    "a hole, no label behind it": {
        "input_ids": TWO, "attention_mask": HOLE, "labels": without(TWO, (0, slice(4, 7))),
    },
    "a mask of sequence numbers": {
        "input_ids": ONE, "attention_mask": torch.tensor([[1] * 5 + [2] * 7]), "labels": ONE,
    },
    "shifted labels": {
        "input_ids": ONE, "labels": ONE,
        "shift_labels": torch.cat([ONE[:, 1:], torch.tensor([[-100]])], 1),
    },
}  # fmt: skip
REFUSED = {
    "left padding, its first token labelled": ("a token that follows padding carries a label", {
        "input_ids": TWO, "attention_mask": LEFT, "labels": without(TWO, (0, slice(0, 3))),
    }),
    "a hole before a label": ("a token that follows padding carries a label", {
        "input_ids": TWO, "attention_mask": HOLE, "labels": without(TWO, (0, slice(4, 6))),
    }),
    "a labelled padding": ("a padded position carries a label", {
        "input_ids": TWO, "attention_mask": HOLE, "labels": TWO,
    }),
}  # fmt: skip


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("name", ALIKE)
def test_loss_and_gradients_are_stocks(name: str, divided: bool) -> None:
    """divided: by what Trainer counts, as it does for accumulated batches."""
    given: dict[str, Any] = {**ALIKE[name], "use_cache": False}  # as Trainer has it
    if divided:
        counted = given.get("shift_labels", given["labels"][:, 1:])
        given["num_items_in_batch"] = (counted != -100).sum()
    stock, ours = tiny_model(), prepare_model(tiny_model(), range(6), also=["embedding"])
    stock.requires_grad_(True)
    a, b = stock(**given).loss, ours(**given).loss
    assert b.item() == pytest.approx(a.item(), abs=CLOSE)
    a.backward()
    b.backward()
    found, wanted = gradients(ours), gradients(stock)
    for key in found:
        assert (found[key] - wanted[key]).abs().max() <= CLOSE * max(1, wanted[key].abs().max())


@pytest.mark.parametrize("name", REFUSED)
def test_labels_that_only_padding_could_predict_are_refused(name: str) -> None:
    said, given = REFUSED[name]
    with pytest.raises(UserError, match=said):
        prepare_model(tiny_model(), [1])(**given)


def test_a_collated_pack_labels_no_first_token() -> None:
    """Then what Trainer counts is what is predicted, whoever made the rows."""
    rows: list[dict[str, Any]] = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "lengths": [2, 3]}
    ]
    made = PackCollator()(rows)
    assert made["labels"].tolist() == [[-100, 6, -100, 8, 9]]
    assert made["supervised_rows"].tolist() == [0, 2, 3]
    assert rows[0]["labels"] == [5, 6, 7, 8, 9]
