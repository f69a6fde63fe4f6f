"""T-Few's losses, against plain loops in float64 and against what the formulas of the reference code give."""

import math

import pytest
import torch

from hf_peft_ext.ranking.losses import choice_loss, choice_scores, lm_loss, token_scores, unlikelihood_loss

VOCAB = 11
LENGTHS = [3, 1, 2, 4, 2, 5]  # tokens of each choice
EXAMPLE = torch.tensor([0, 0, 1, 1, 1, 2])  # the last example has one choice only
CORRECT = torch.tensor([False, True, True, False, False, True])


@pytest.fixture
def batch():
    torch.manual_seed(0)
    logits = (3 * torch.randn(len(LENGTHS), max(LENGTHS), VOCAB)).double().requires_grad_()
    labels = torch.randint(VOCAB, logits.shape[:-1])
    for row, length in enumerate(LENGTHS):
        labels[row, length:] = -100
    return logits, labels


def p(logits, labels, row, t):
    weights = [math.exp(x) for x in logits[row, t].tolist()]
    return weights[labels[row, t]] / sum(weights)


def plain(logits, labels, average="token", epsilon=0.0, power=1.0):
    """The three losses, token by token."""
    rows = range(len(LENGTHS))
    probability = [[p(logits, labels, row, t) for t in range(LENGTHS[row])] for row in rows]
    nll = [[-math.log(q) for q in probability[row]] for row in rows]
    rest = [[-math.log(1 - q + epsilon) for q in probability[row]] for row in rows]
    examples = [[row for row in rows if EXAMPLE[row] == i] for i in EXAMPLE.unique()]
    groups = [[row for row in rows if CORRECT[row]]] if average == "token" else [[row] for row in rows if CORRECT[row]]
    lm = [sum(sum(nll[row]) for row in group) / sum(LENGTHS[row] for row in group) for group in groups]
    wrong = [[row for row in example if not CORRECT[row]] for example in examples]
    groups = [[row for rows in wrong for row in rows]] if average == "token" else [rows for rows in wrong if rows]
    ul = [sum(sum(rest[row]) for row in group) / sum(LENGTHS[row] for row in group) for group in groups]
    ln = []
    for example in examples:
        if len(example) > 1:
            beta = {row: -sum(nll[row]) / LENGTHS[row] ** power for row in example}
            answer = next(row for row in example if CORRECT[row])
            ln.append(-beta[answer] + math.log(sum(math.exp(b) for b in beta.values())))
    return tuple(sum(terms) / len(terms) for terms in (lm, ln, ul))


@pytest.mark.parametrize("average", ["token", "example"])
@pytest.mark.parametrize("epsilon", [0.0, 0.01])
@pytest.mark.parametrize("power", [1.0, 0.0, 0.5])
def test_losses_are_the_formulas(batch, average, epsilon, power):
    """All three equal plain loops, for examples of two, three and one choices."""
    logits, labels = batch
    tokens = token_scores(logits.float(), labels)
    lm, ln, ul = plain(logits, labels, average, epsilon, power)
    assert lm_loss(tokens, CORRECT, average).item() == pytest.approx(lm, rel=1e-5)
    assert choice_loss(tokens, CORRECT, EXAMPLE, power).item() == pytest.approx(ln, rel=1e-5)
    assert unlikelihood_loss(tokens, CORRECT, EXAMPLE, epsilon, average).item() == pytest.approx(ul, rel=1e-5)


def test_gradients_are_those_of_the_reference(batch):
    """The formulas of the reference code, which pads every choice to one length, give the same gradients."""
    logits, labels = batch
    row = slice(2, 5)  # one example, as in the reference's batches of one
    tokens = token_scores(logits[row].float(), labels[row])
    correct, example = CORRECT[row], EXAMPLE[row]
    ours = lm_loss(tokens, correct) + choice_loss(tokens, correct, example)
    ours = ours + unlikelihood_loss(tokens, correct, example, epsilon=0.01)
    (gradient,) = torch.autograd.grad(ours, logits)

    mask = labels[row] != -100
    log_p = logits[row].log_softmax(-1).gather(-1, labels[row].clamp_min(0).unsqueeze(-1)).squeeze(-1)
    nll = torch.where(mask, -log_p, 0)
    scores = nll.sum(1) / mask.sum(1)
    wrong = mask & ~correct.unsqueeze(1)
    ul = -torch.log(1 - torch.where(wrong, log_p, -100).exp() + 0.01).sum() / wrong.sum()
    theirs = nll[0].sum() / mask[0].sum() + torch.nn.functional.cross_entropy(-scores[None], torch.tensor([0])) + ul
    (reference,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)
    masked = (~wrong).sum().item()  # each adds -log(1.01) there, and nothing here
    assert ours.item() == pytest.approx(theirs.item() + masked * math.log(1.01) / wrong.sum().item(), rel=1e-5)


def test_near_one_nothing_is_lost():
    """log(1 - p) is exact where 1 - exp(log p) is 0 in float32, and its gradient is finite."""
    logits = torch.zeros(1, 1, 4)
    logits[0, 0, 2] = 40.0
    logits.requires_grad_()
    tokens = token_scores(logits, torch.tensor([[2]]))
    assert (1 - tokens.log_p.exp()).item() == 0
    assert tokens.log_rest.item() == pytest.approx(math.log(3) - 40, rel=1e-6)
    loss = unlikelihood_loss(tokens, torch.tensor([False]), torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()
    assert gradient[0, 0, 2].item() == pytest.approx(1)


def test_half_precision_is_computed_in_float32(batch):
    """bfloat16 logits give the loss of the same numbers in float32."""
    logits, labels = batch
    half = logits.detach().bfloat16()
    assert token_scores(half, labels).log_p.equal(token_scores(half.float(), labels).log_p)


def test_parts_add_up_to_the_whole(batch):
    """Micro-batches with the counts of the whole step give its losses and gradients."""
    logits, labels = batch

    def losses(rows, counts):
        tokens, correct, example = token_scores(logits[rows].float(), labels[rows]), CORRECT[rows], EXAMPLE[rows]
        return (
            lm_loss(tokens, correct, count=counts and counts[0])
            + choice_loss(tokens, correct, example, count=counts and counts[1])
            + unlikelihood_loss(tokens, correct, example, count=counts and counts[2])
        )

    length = torch.tensor(LENGTHS)
    counts = length[CORRECT].sum(), 2, length[~CORRECT].sum()
    parts = losses(slice(0, 2), counts) + losses(slice(2, 6), counts)
    whole = losses(slice(0, 6), None)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    (a,), (b,) = torch.autograd.grad(parts, logits), torch.autograd.grad(whole, logits)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_parts_by_example_add_up_to_the_whole(batch, kind):
    """The same with averages by example, whose counts are answers, and examples with wrong choices."""
    logits, labels = batch

    def losses(rows, counts=(None, None)):
        tokens, correct, example = token_scores(logits[rows].float(), labels[rows]), CORRECT[rows], EXAMPLE[rows]
        answers = lm_loss(tokens, correct, "example", counts[0])
        return answers + unlikelihood_loss(tokens, correct, example, 0.01, "example", counts[1])

    counts = kind(int(CORRECT.sum())), kind(len(EXAMPLE[~CORRECT].unique()))
    parts = losses(slice(0, 2), counts) + losses(slice(2, 6), counts)
    assert parts.item() == pytest.approx(losses(slice(0, 6)).item(), rel=1e-6)


@pytest.mark.parametrize("average", ["token", "example"])
def test_counts_of_nothing(batch, average):
    """A step without answers or wrong choices gives 0, whether its count is a number or a tensor."""
    logits, labels = batch
    tokens = token_scores(logits.float(), labels)
    for count in (None, 0, torch.tensor(0)):
        none, every = torch.zeros_like(CORRECT), torch.ones_like(CORRECT)
        assert lm_loss(tokens, none, average, count).item() == 0
        assert unlikelihood_loss(tokens, every, EXAMPLE, 0.0, average, count).item() == 0
        assert choice_loss(tokens, none, EXAMPLE, count=count).item() == 0


def test_one_choice_has_no_choice_losses(batch):
    """An example with one choice adds 0, not NaN, and its gradient is finite."""
    logits, labels = batch
    tokens = token_scores(logits[5:].float(), labels[5:])
    correct, example = CORRECT[5:], EXAMPLE[5:]
    terms = choice_loss(tokens, correct, example), unlikelihood_loss(tokens, correct, example)
    assert [term.item() for term in terms] == [0, 0]
    (gradient,) = torch.autograd.grad(sum(terms) + lm_loss(tokens, correct), logits)
    assert gradient.isfinite().all()


def test_two_choices_have_a_choice_loss(batch):
    """The fewest that an example can be ranked among: minus the log of the answer's share."""
    logits, labels = batch
    tokens = token_scores(logits[:2].float(), labels[:2])
    correct, example = torch.tensor([True, False]), torch.tensor([7, 7])
    answer, other = choice_scores(tokens)
    expected = torch.logsumexp(torch.stack([answer, other]), 0) - answer
    torch.testing.assert_close(choice_loss(tokens, correct, example), expected)


def test_scores_rank_the_choices(batch):
    """Length-normalised scores are mean log-probabilities; their sum with power 0."""
    logits, labels = batch
    tokens = token_scores(logits, labels)
    sums = [sum(math.log(p(logits, labels, row, t)) for t in range(n)) for row, n in enumerate(LENGTHS)]
    means = [total / n for total, n in zip(sums, LENGTHS, strict=True)]
    assert choice_scores(tokens).tolist() == pytest.approx(means, rel=1e-5)
    assert choice_scores(tokens, power=0).tolist() == pytest.approx(sums, rel=1e-5)


def test_wrong_shapes_are_named(batch):
    """Labels of another shape, and rows without a token, are refused."""
    logits, labels = batch
    with pytest.raises(ValueError, match=r"`labels` \(=\(6, 4\)\) must have the shape of `logits`"):
        token_scores(logits, labels[:, :-1])
    labels[3] = -100
    with pytest.raises(ValueError, match=r"`labels` \(=\[3\]\) has rows in which every label is -100"):
        token_scores(logits, labels)
