// A chunk just written, for hldm.kernels.close: its latent, and the trunk's step.

#include <numeric>

#include "stack.h"

namespace {

// d, the encoder's width; k, the latent's readout's.
struct Closing {
    int64_t rows, bytes, d, k, z, threads;
    Stack trunk;                       // of no blocks where there is none
    const float* const* to_trunk;      // weight (w 2d), bias; none without a trunk
    const float *inner, *inner_bias, *place, *outer, *outer_bias;  // hldm.model.readouts.PlacedReadout
    const float *mean, *deviation;     // (z) hldm.model.readouts.LatentNormaliser
    const float* features;             // (b l d) of the encoder at each byte
    const int64_t* length;             // (b)
    const uint8_t* opens;              // (b)
    float *feature, *known, *latents;  // (b d) at the last byte, (b w), (b z)
};

struct Closer {
    const Closing& w;
    int64_t first, rows;

    // Every byte's part in the mean, whoever's it is: L bytes at a time.
    void find_latents() {
        std::vector<std::pair<int64_t, int64_t>> bytes;
        for (int64_t row = first; row < first + rows; row++)
            for (int64_t at = 0; at < w.length[row]; at++) bytes.push_back({row, at});
        std::vector<float> pooled(rows * w.k), raw(w.z);
        in_groups(bytes.size(), [&](auto lanes, int64_t from, int64_t count) {
            constexpr int L = decltype(lanes)::value;
            std::vector<float> read((w.d + w.k) * L, 0.0f);
            float* placed = read.data() + w.d * L;
            for (int64_t lane = 0; lane < count; lane++) {
                const auto [row, at] = bytes[from + lane];
                for (int64_t i = 0; i < w.d; i++)
                    read[i * L + lane] = w.features[(row * w.bytes + at) * w.d + i];
            }
            multiply<L>(w.inner, read.data(), placed, w.k, w.d);
            for (int64_t lane = 0; lane < count; lane++)
                for (int64_t i = 0; i < w.k; i++)
                    placed[i * L + lane] += w.inner_bias[i] + w.place[bytes[from + lane].second * w.k + i];
            gelu_all(placed, w.k * L);
            for (int64_t lane = 0; lane < count; lane++) {
                const int64_t row = bytes[from + lane].first;
                const float share = 1.0f / w.length[row];
                for (int64_t i = 0; i < w.k; i++) pooled[(row - first) * w.k + i] += share * placed[i * L + lane];
            }
        });
        for (int64_t row = 0; row < rows; row++) {
            multiply<1>(w.outer, &pooled[row * w.k], raw.data(), w.z, w.k);
            for (int64_t j = 0; j < w.z; j++)
                w.latents[(first + row) * w.z + j] = (raw[j] + w.outer_bias[j] - w.mean[j]) / w.deviation[j];
        }
    }

    // The trunk reads the feature at the last byte and the mean over all.
    template <int L>
    void step(const int64_t* index, int64_t count) {
        const int64_t d = w.d;
        std::vector<float> summary(2 * d * L, 0.0f);
        for (int64_t lane = 0; lane < count; lane++) {
            const int64_t row = index[lane], length = w.length[row];
            const float* y = w.features + row * w.bytes * d;
            std::copy_n(y + (length - 1) * d, d, w.feature + row * d);
            for (int64_t i = 0; i < d; i++) {
                summary[i * L + lane] = y[(length - 1) * d + i];
                float sum = 0;
                for (int64_t at = 0; at < length; at++) sum += y[at * d + i];
                summary[(d + i) * L + lane] = sum / length;
            }
        }
        if (!w.to_trunk) return;
        const int64_t width = w.trunk.shape.d;
        Group<L> group(w.trunk.shape, index, count, w.opens, w.opens);
        linear<L>(w.to_trunk, summary.data(), group.x, width, 2 * d);
        group.run(w.trunk.is_recurrent, w.trunk.weights, w.trunk.rotation, w.trunk.state, w.trunk.state);
        group.collect(group.normed, width, w.known);
    }

    void run() {
        std::vector<int64_t> index(rows);
        std::iota(index.begin(), index.end(), first);
        find_latents();
        in_groups(rows, [&](auto lanes, int64_t from, int64_t count) {
            step<decltype(lanes)::value>(&index[from], count);
        });
    }
};

}  // namespace

extern "C" void hldm_close(const Closing* closing) {
    over_threads(closing->rows, closing->threads,
                 [&](int64_t begin, int64_t rows) { Closer{*closing, begin, rows}.run(); });
}
