"""FuseLLM's target: the loss that it stands for, whose distribution is taken, and what the last position knows."""

import pytest
import torch
import torch.nn.functional as F

from polymerge.bench.fuse import FusedTeacher, fused


@pytest.fixture
def log_probs():
    """Expert 0 is better on row 0, expert 1 on row 1."""
    made = torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    following = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(1))
    for k in range(2):
        made[k, k].scatter_(-1, following[k][:, None], 4.0)
    return made.log_softmax(-1), following


def test_each_text_takes_the_expert_with_the_least_cross_entropy_on_it(log_probs):
    found = fused(*log_probs, modelling=0.0)
    torch.testing.assert_close(found, torch.stack([log_probs[0][0, 0], log_probs[0][1, 1]]))


def test_the_divergence_from_it_is_the_papers_loss_up_to_a_constant(log_probs):
    """The same gradient in the student's logits."""
    rows, following = log_probs
    student = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    goal = fused(rows, following, 0.9)
    torch.testing.assert_close(goal.exp().sum(-1), torch.ones(2, 5).double())
    F.kl_div(student.log_softmax(-1), goal, log_target=True, reduction="sum").backward()
    mine, student.grad = student.grad, None
    best = torch.stack([rows[0, 0], rows[1, 1]]).exp()
    plain = F.cross_entropy(student.flatten(0, 1), following.flatten(), reduction="sum")
    (0.9 * plain - 0.1 * (best * student.log_softmax(-1)).sum()).backward()
    torch.testing.assert_close(mine, student.grad)


def test_where_the_next_token_is_unknown_the_distribution_stands_alone(log_probs):
    rows, following = log_probs
    following[:, -1] = -1
    found = fused(rows, following, 0.9)
    torch.testing.assert_close(found[0, -1], rows[0, 0, -1])


def test_two_experts_teach_as_one_model(save_model, tmp_path):
    from transformers import AutoModelForCausalLM

    folders = [save_model(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 1))]
    experts = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    tokens = torch.randint(0, 257, (3, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        taught = FusedTeacher(experts)(input_ids=tokens, use_cache=False).logits.softmax(-1)
        alone = [e(input_ids=tokens).logits[:, -1].softmax(-1) for e in experts]
    assert taught.shape == (3, 6, 257)
    assert float(taught[:, :-1].gather(-1, tokens[:, 1:, None]).min()) >= 0.9
    assert all(any(torch.allclose(row, other[i], atol=1e-6) for other in alone) for i, row in enumerate(taught[:, -1]))
