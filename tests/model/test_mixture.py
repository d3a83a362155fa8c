import json
import math

import pytest
import torch
import torch.nn.functional as F

from hldm.generation.writer import row_generators
from hldm.model.diffusion import Schedule, alpha_sigma, sample, sampler_steps
from hldm.model.mixture import MixturePredictor
from tests.model.test_diffusion import noise_to


def make_mixture(components: int = 5, z: int = 2, **settings) -> MixturePredictor:
    torch.manual_seed(0)
    mixture = MixturePredictor(8, z, components, **settings).double()
    mixture.log_deviation.data = torch.tensor([math.log(0.3), math.log(0.8)], dtype=torch.float64)[:z]
    return mixture


def test_capped_logits_do_not_go_beyond_their_cap():
    mixture = make_mixture(logit_cap=2.0)
    feature = torch.randn(7, 8, dtype=torch.float64)
    mixture.weigh[3].weight.data *= 100
    logits = mixture.weigh(feature).float()
    assert logits.abs().max() > 10
    found = mixture.log_weights(feature)
    torch.testing.assert_close(found, F.log_softmax(2 * torch.tanh(logits / 2), dim=-1))
    assert (found.amax(-1) - found.amin(-1)).max() <= 4


def test_the_density_is_that_of_the_mixture_written_out():
    mixture = make_mixture()
    z, gamma = torch.randn(7, 2, dtype=torch.float64), torch.linspace(-3, 3, 7, dtype=torch.float64)
    log_weights = mixture.log_weights(torch.randn(7, 8, dtype=torch.float64)).double()
    alpha, sigma = alpha_sigma(gamma)
    for i in range(7):
        variance = alpha[i] ** 2 * (2 * mixture.log_deviation).exp() + sigma[i] ** 2
        normal = torch.distributions.Normal(alpha[i] * mixture.prototypes, variance.sqrt())
        expected = log_weights[i] + normal.log_prob(z[i]).sum(-1)
        torch.testing.assert_close(mixture.joint(z, gamma, log_weights)[i], expected)
        alone = mixture.joint(z[i], gamma[i], log_weights[i])
        torch.testing.assert_close(alone, expected)


def test_the_denoiser_is_the_slope_of_the_density():
    """Tweedie: alpha E[mu | z] = z + sigma^2 d/dz log p(z)."""
    mixture = make_mixture()
    z = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    gamma = torch.linspace(-3, 3, 7, dtype=torch.float64)
    log_weights = mixture.log_weights(torch.randn(7, 8, dtype=torch.float64)).double()
    mixture.joint(z, gamma, log_weights).logsumexp(-1).sum().backward()
    alpha, sigma = (x[:, None] for x in alpha_sigma(gamma))
    torch.testing.assert_close(alpha * mixture.denoise(z, gamma, log_weights), z + sigma.square() * z.grad)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_drawing_from_its_own_reverse_process_is_exact_at_any_number_of_steps(steps):
    """Through the steps come the mixture's own shares, means and variances; by its mean alone, less variance."""
    torch.manual_seed(0)
    mixture = MixturePredictor(8, 1, 3)
    mixture.prototypes.data = torch.tensor([[-2.0], [0.0], [3.0]])
    mixture.log_deviation.data = torch.tensor([math.log(0.2)])
    rows, gamma_0 = 20_000, -3.0
    log_weights = torch.tensor([0.2, 0.5, 0.3]).log().expand(rows, -1)
    schedule = Schedule(noise_to(12.0)(gamma_0=gamma_0))
    plan, generators = sampler_steps("ancestral", schedule, steps), row_generators(0, rows)

    def denoise(z, gamma):
        return mixture.denoise(z, gamma, log_weights)

    def spread(z, gamma, u):
        return mixture.spread(z, gamma, log_weights, u)

    z = sample(denoise, (rows, 1), plan, generators, spread=spread)[:, 0]
    alpha, sigma = alpha_sigma(torch.tensor(gamma_0))
    border = alpha * torch.tensor([-1.0, 1.5])
    found = torch.bucketize(z, border)
    for k, (share, mean) in enumerate(zip((0.2, 0.5, 0.3), (-2.0, 0.0, 3.0), strict=True)):
        own = z[found == k]
        assert abs(len(own) / rows - share) < 4 * math.sqrt(share * (1 - share) / rows)
        deviation = float((alpha**2 * 0.2**2 + sigma**2).sqrt())
        # the borders cut the tails: 4.7 deviations from the outer means, 3.2 from the middle one
        assert abs(own.mean() - alpha * mean) < 5 * deviation / math.sqrt(len(own))
        assert abs(own.std() / deviation - 1) < 0.03
    by_mean = sample(denoise, (rows, 1), plan, row_generators(0, rows))[:, 0]
    assert by_mean.std() < 0.97 * z.std()


def test_its_rate_is_the_diffusion_bound_under_its_denoiser():
    """KL(q(z_0 | x) || p(z_0)) = 1/2 E[d gamma e^-gamma ||mu - mu_hat||^2] + the same KL at gamma_1."""
    mixture = make_mixture(components=3)
    torch.manual_seed(1)
    low, high, draws = -2.0, 8.0, 200_000
    mu = torch.tensor([0.7, -1.1], dtype=torch.float64).expand(draws, 2)
    log_weights = mixture.log_weights(torch.randn(8, dtype=torch.float64)).double().expand(draws, -1)
    noise = torch.randn(draws, 2, dtype=torch.float64)
    with torch.no_grad():
        rates = [mixture.rate(mu, noise, gamma, log_weights).mean() for gamma in (low, high)]
        gamma = low + (high - low) * (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
        alpha, sigma = (x[:, None] for x in alpha_sigma(gamma))
        error = (mu - mixture.denoise(alpha * mu + sigma * noise, gamma, log_weights)).square().sum(-1)
        integral = 0.5 * ((high - low) * torch.exp(-gamma) * error).mean()
    torch.testing.assert_close(rates[0], integral + rates[1], rtol=0.01, atol=0.01)


def test_samples_have_the_mean_and_spread_of_the_mixture_and_belong_to_their_generators():
    mixture = make_mixture(components=3).float()
    rows, gamma = 20_000, 0.5
    log_weights = mixture.log_weights(torch.randn(8)).expand(rows, -1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(rows)]
    with torch.no_grad():
        drawn = mixture.sample(gamma, log_weights, generators)
        w = log_weights[0].exp()[:, None]
        alpha, sigma = alpha_sigma(torch.tensor(gamma))
        mean = (w * alpha * mixture.prototypes).sum(0)
        within = alpha**2 * (2 * mixture.log_deviation).exp() + sigma**2
        variance = within + (w * (alpha * mixture.prototypes - mean).square()).sum(0)
        torch.testing.assert_close(drawn.mean(0), mean, atol=0.03, rtol=0)
        torch.testing.assert_close(drawn.var(0), variance, rtol=0.03, atol=0)
        alone = mixture.sample(gamma, log_weights[7:8], [torch.Generator().manual_seed(7)])
        torch.testing.assert_close(alone, drawn[7:8])
        coldest = mixture.sample(gamma, log_weights[:2], generators[:2], temperature=0)
        torch.testing.assert_close(coldest, (alpha * mixture.prototypes[w.argmax()]).expand(2, -1))


def test_a_saved_mixture_keeps_its_cap_and_older_ones_have_none(tmp_path):
    mixture = make_mixture(logit_cap=3.0).float()
    mixture.save_pretrained(tmp_path / "new")
    feature = torch.randn(4, 8)
    found = MixturePredictor.from_pretrained(tmp_path / "new")
    torch.testing.assert_close(found.log_weights(feature), mixture.log_weights(feature))
    make_mixture().float().save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    del config["logit_cap"]
    path.write_text(json.dumps(config))
    assert MixturePredictor.from_pretrained(tmp_path / "old").logit_cap == 0
