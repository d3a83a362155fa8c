// All denoising steps of a batch of latents, for hldm.kernels.denoise: the mixture's estimate, the network's correction, the
// solver's step. Rows are taken L at a time as in stack.h; what depends on the noise level alone comes worked out.

#include "stack.h"

namespace {

struct Denoising {
    int64_t rows, steps, z, d, width, heads, entries, components, hidden, blocks, threads;
    const float* levels;              // (steps 2) alpha and sigma
    const float* solver;              // (steps 4) weights of z, x0, the x0 before and the noise
    const float* noise;               // (steps b z)
    const double* uniform;            // (steps b): steps draw x0 from the mixture's share; null: they take its mean
    double temperature;               // of that draw
    const float* log_weights;         // (b k)
    const float *prototypes, *square; // (k z), (z) variance of every component
    const float* const* inputs;       // weight (d 2z), bias (d)
    const float* const* outputs;      // weight (z d), bias (z)
    const float* const* parameters;   // of each block: query, its bias, attended, its bias, both of the MLP, with theirs
    const float* const* conditioning; // of each block: shared (b 4d), gates (b 2d), key, value (b h c e), bias (b h c)
    const float* const* by_level;     // of each block: (steps 4d) shifts and scales
    float* latent;                    // (b z) in and out
};

template <int L>
struct Denoiser {
    const Denoising& w;
    int64_t first, rows;
    std::vector<float> numbers;
    float *z, *x0, *before, *estimate, *offset, *x, *y, *wide, *query;
    std::vector<float> variance;  // of a draw of x0 around its component's mean

    Denoiser(const Denoising& w, int64_t first, int64_t rows) : w(w), first(first), rows(rows), variance(w.z) {
        const int64_t most = std::max({w.components, w.hidden, w.d, w.width, 2 * w.z});
        numbers.assign((5 * w.z + 2 * w.d + 2 * most + w.width) * L, 0.0f);
        z = numbers.data();
        x0 = z + w.z * L;
        before = x0 + w.z * L;
        estimate = before + w.z * L;
        offset = estimate + w.z * L;
        x = offset + w.z * L;
        y = x + w.d * L;
        wide = y + w.d * L;
        query = wide + 2 * most * L;
    }

    // The component that row l draws, of `share`: unnormalised, the largest 1
    int64_t choose(const float* share, int64_t l, double u) const {
        const auto sharpened = [&](int64_t i) {
            const double p = share[i * L + l];
            return w.temperature == 1 ? p : std::pow(p, 1 / std::max(w.temperature, 1e-6));
        };
        double total = 0, sum = 0;
        for (int64_t i = 0; i < w.components; i++) total += sharpened(i);
        for (int64_t i = 0; i < w.components; i++)
            if ((sum += sharpened(i)) > u * total) return i;
        return w.components - 1;
    }

    // E[mu | z] under the mixture, and how far from it a draw lies: denoise and spread of
    // hldm.model.mixture.MixturePredictor
    void ask_mixture(float alpha, float sigma, const double* uniform) {
        const int64_t k = w.components;
        float *scaled = wide, *share = wide + w.z * L;
        std::vector<float> precision(w.z), gain(w.z);
        for (int64_t j = 0; j < w.z; j++) {
            precision[j] = 1.0f / (alpha * alpha * w.square[j] + sigma * sigma);
            gain[j] = alpha * w.square[j] * precision[j];
            for (int l = 0; l < L; l++) scaled[j * L + l] = alpha * z[j * L + l] * precision[j];
        }
        multiply<L>(w.prototypes, scaled, share, k, w.z);
        float largest[L], total[L] = {};
        std::fill(largest, largest + L, -INFINITY);
        for (int64_t i = 0; i < k; i++) {
            float own = 0;
            for (int64_t j = 0; j < w.z; j++)
                own += precision[j] * w.prototypes[i * w.z + j] * w.prototypes[i * w.z + j];
            for (int64_t l = 0; l < L; l++) {
                const float log_weight = l < rows ? w.log_weights[(first + l) * k + i] : 0.0f;
                share[i * L + l] += log_weight - 0.5f * alpha * alpha * own;
                largest[l] = std::max(largest[l], share[i * L + l]);
            }
        }
        for (int64_t i = 0; i < k; i++)
            for (int l = 0; l < L; l++) total[l] += share[i * L + l] = exponential(share[i * L + l] - largest[l]);
        multiply_transposed<L>(w.prototypes, share, estimate, w.z, k);
        for (int64_t j = 0; j < w.z; j++)
            for (int l = 0; l < L; l++) {
                const float mean = estimate[j * L + l] / total[l];
                estimate[j * L + l] = mean + gain[j] * (z[j * L + l] - alpha * mean);
                offset[j * L + l] = -(1 - alpha * gain[j]) * mean;
            }
        if (uniform == nullptr) return;
        for (int64_t j = 0; j < w.z; j++) variance[j] = (1 - alpha * gain[j]) * w.square[j];
        for (int64_t l = 0; l < rows; l++) {
            const float* prototype = w.prototypes + choose(share, l, uniform[first + l]) * w.z;
            for (int64_t j = 0; j < w.z; j++) offset[j * L + l] += (1 - alpha * gain[j]) * prototype[j];
        }
    }

    // y = standardised x (1 + scale) + shift, each the context's and the noise level's together; half: 0 or 1
    void modulate(const float* shared, const float* level, int64_t half) {
        const int64_t d = w.d;
        standardise<L>(x, y, d);
        for (int64_t row = 0; row < rows; row++) {
            const float *own = shared + (first + row) * 4 * d + half * 2 * d, *all = level + half * 2 * d;
            for (int64_t i = 0; i < d; i++)
                y[i * L + row] = y[i * L + row] * (1 + (own[d + i] + all[d + i])) + (own[i] + all[i]);
        }
    }

    // x += (1 + gate) part
    void add_gated(const float* part, const float* gates, int64_t half) {
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < w.d; i++)
                x[i * L + row] += (1 + gates[(first + row) * 2 * w.d + half * w.d + i]) * part[i * L + row];
    }

    // Attention of one position a row to its entries; query in, what is attended out
    void attend(const float* key, const float* value, const float* bias) {
        std::vector<Seen> seen;
        for (int64_t row = 0; row < rows; row++)
            for (int64_t head = 0; head < w.heads; head++) {
                const int64_t e = w.width / w.heads, at = ((first + row) * w.heads + head) * w.entries;
                seen.clear();
                for (int64_t j = 0; j < w.entries; j++)
                    if (bias[at + j] != -INFINITY) seen.push_back({j, bias[at + j]});
                attend_to<L>(seen, key + at * e, value + at * e, e, query + head * e * L + row);
            }
    }

    void run() {
        const int64_t d = w.d;
        into_lanes<L>(w.latent + first * w.z, rows, w.z, z);
        for (int64_t step = 0; step < w.steps; step++) {
            const float alpha = w.levels[2 * step], sigma = w.levels[2 * step + 1];
            ask_mixture(alpha, sigma, w.uniform == nullptr ? nullptr : w.uniform + step * w.rows);
            std::copy(z, z + w.z * L, wide);
            std::copy(estimate, estimate + w.z * L, wide + w.z * L);
            linear<L>(w.inputs, wide, x, d, 2 * w.z);
            for (int64_t block = 0; block < w.blocks; block++) {
                const float *const *p = w.parameters + 8 * block, *const *conditioning = w.conditioning + 5 * block;
                const float* level = w.by_level[block] + step * 4 * d;
                modulate(conditioning[0], level, 0);
                linear<L>(p, y, query, w.width, d);
                attend(conditioning[2], conditioning[3], conditioning[4]);
                linear<L>(p + 2, query, wide, d, w.width);
                add_gated(wide, conditioning[1], 0);
                modulate(conditioning[0], level, 1);
                linear<L>(p + 4, y, wide, w.hidden, d);
                gelu_all(wide, w.hidden * L);
                linear<L>(p + 6, wide, y, d, w.hidden);
                add_gated(y, conditioning[1], 1);
            }
            standardise<L>(x, y, d);
            linear<L>(w.outputs, y, x0, w.z, d);
            const float* solver = w.solver + 4 * step;
            for (int64_t j = 0; j < w.z; j++) {
                const bool draws = w.uniform != nullptr;
                const float own = draws ? solver[1] * solver[1] * variance[j] : 0;
                const float deviation = draws ? std::sqrt(solver[3] * solver[3] + own) : solver[3];
                for (int64_t row = 0; row < rows; row++) {
                    const int64_t i = j * L + row;
                    x0[i] = estimate[i] + sigma * x0[i];
                    const float noise = w.noise[(step * w.rows + first + row) * w.z + j];
                    z[i] = solver[0] * z[i] + solver[1] * (draws ? x0[i] + offset[i] : x0[i]) +
                           solver[2] * before[i] + deviation * noise;
                }
            }
            std::swap(x0, before);
        }
        from_lanes<L>(z, rows, w.z, w.latent + first * w.z);
    }
};

}  // namespace

extern "C" void hldm_denoise(const Denoising* denoising) {
    over_threads(denoising->rows, denoising->threads, [&](int64_t begin, int64_t rows) {
        in_groups(rows, [&](auto lanes, int64_t first, int64_t count) {
            Denoiser<decltype(lanes)::value>(*denoising, begin + first, count).run();
        });
    });
}
