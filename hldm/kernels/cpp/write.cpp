// Symbols of a whole chunk, or of a stretch of the twin's, for hldm.kernels.write: decoder, draw and encoder in turns until
// every row has ended. A row that has ended leaves the groups, and its state stays as it is. Then the chunks' latents, and
// the trunk's step.

#include <numeric>

#include "stack.h"

namespace {

constexpr int64_t OUTPUTS = 258, END_OF_CHUNK = 256;  // and 257, the end of the document

// d, w: widths of decoder and encoder
struct Writing {
    int64_t rows, events, z, placed, pooled, threads;  // placed, pooled: widths within the readouts from and to latents
    double temperature, top_p, floor;  // floor: share of the probability that all symbols have alike
    Stack decoder, encoder, trunk;     // the twin has the decoder alone
    const float *write, *read;         // (v d), (v w) embeddings
    const float* const* outputs;       // weight (258 d), bias
    const float* const* from_latent;   // place (events placed), weight (d placed), bias; none for the twin
    const float* const* from_text;     // weight (d w), bias; none where bytes are not read
    const float* const* to_latent;     // both layers, each with its bias, place, mean, deviation; none: not by their mean
    const float* const* to_trunk;      // weight (. 2w), bias; none without a trunk
    const float *known, *inner;        // (b d) what the trunk adds to every event, or none; (b placed) of the latent
    const float* u;                    // (b events) in [0, 1)
    const uint8_t *doc_start, *resets, *starts;  // (b) of the first event: a document's; the decoder's
    const int64_t* symbol;             // (b) before the first event
    int64_t* emitted;                  // (b events)
    float *feature, *features;         // (b w) of the encoder at the last byte, in and out; (b events-1 w) at each written
    float *latents, *trunk_output;     // (b z), (b .) of the chunks written
};

// hldm.generation.chunk.pick: by inverse CDF over symbols from the likeliest down, which is where the search most often ends.
int64_t pick(const float* logits, float u, double temperature, double top_p) {
    int64_t likeliest = 0;
    for (int64_t i = 1; i < OUTPUTS; i++)
        if (!(logits[i] <= logits[likeliest])) likeliest = i;
    if (temperature == 0) return likeliest;
    double p[OUTPUTS], total = 0;
    for (int64_t i = 0; i < OUTPUTS; i++) total += p[i] = std::exp((double(logits[i]) - logits[likeliest]) / temperature);
    int64_t order[OUTPUTS], taken = 0;
    double cdf[OUTPUTS], sum = 0;
    const auto take = [&] {  // the likeliest of the rest, the first of equals
        int64_t best = std::max_element(p, p + OUTPUTS) - p;
        order[taken] = best, cdf[taken++] = sum += p[best];
        p[best] = -1;
    };
    if (top_p < 1) {  // the nucleus first: it is what u is a share of
        while (taken < OUTPUTS && sum < top_p * total) take();
        total = sum;
    }
    const double target = u * total;
    for (int64_t k = 0; k < OUTPUTS; k++) {
        if (k == taken) take();
        if (cdf[k] > target) return order[k];
    }
    return likeliest;
}

// hldm.model.likelihood.floored
void raise(float* logits, double floor) {
    const float largest = *std::max_element(logits, logits + OUTPUTS);
    double total = 0;
    float p[OUTPUTS];
    for (int64_t i = 0; i < OUTPUTS; i++) total += p[i] = std::exp(logits[i] - largest);
    const float share = (1 - floor) / total, even = floor / OUTPUTS;
    for (int64_t i = 0; i < OUTPUTS; i++) logits[i] = std::log(share * p[i] + even);
}

struct Writer {
    const Writing& w;
    std::vector<uint8_t> never;  // flags of all events but the first
    std::vector<int64_t> symbol, length;  // the latest, and how many bytes were read back

    explicit Writer(const Writing& w)
        : w(w), never(w.rows, 0), symbol(w.symbol, w.symbol + w.rows), length(w.rows, 0) {}

    // Event e of a group: one position of the decoder, and a symbol for each row.
    template <int L>
    void emit(int64_t e, const int64_t* index, int64_t rows) {
        const int64_t d = w.decoder.d, width = w.encoder.d, k = w.placed;
        static thread_local std::vector<float> lanes;
        lanes.assign((width + 2 * d + k + OUTPUTS) * L, 0.0f);
        float *feature = lanes.data(), *text = feature + width * L, *logits = text + d * L;
        float *placed = logits + OUTPUTS * L, *told = placed + k * L;
        Group<L> group(w.decoder, index, rows, e ? never.data() : w.resets, e ? never.data() : w.starts);
        if (w.from_text) {
            for (int64_t row = 0; row < rows; row++)
                for (int64_t i = 0; i < width; i++) feature[i * L + row] = w.feature[index[row] * width + i];
            linear<L>(w.from_text, feature, text, d, width);
        }
        if (w.from_latent) {  // hldm.model.readouts.PlacedReadout
            for (int64_t row = 0; row < rows; row++)
                for (int64_t i = 0; i < k; i++)
                    placed[i * L + row] = w.inner[index[row] * k + i] + w.from_latent[0][e * k + i];
            gelu_all(placed, k * L);
            linear<L>(w.from_latent + 1, placed, told, d, k);
        }
        for (int64_t row = 0; row < rows; row++) {
            const float* embedded = w.write + symbol[index[row]] * d;
            const float* known = w.known ? w.known + index[row] * d : nullptr;
            const bool reads = w.from_text && (e || !w.doc_start[index[row]]);
            for (int64_t i = 0; i < d; i++)
                group.x[i * L + row] = embedded[i] + told[i * L + row] + (known ? known[i] : 0) + (reads ? text[i * L + row] : 0);
        }
        group.run();
        linear<L>(w.outputs, group.normed, logits, OUTPUTS, d);

        for (int64_t row = 0; row < rows; row++) {
            float own[OUTPUTS];
            for (int64_t i = 0; i < OUTPUTS; i++) own[i] = logits[i * L + row];
            if (w.floor > 0) raise(own, w.floor);
            if (!w.from_latent) own[END_OF_CHUNK] = -INFINITY;
            if (w.from_latent && e == 0) std::fill(own + END_OF_CHUNK, own + OUTPUTS, -INFINITY);  // no chunk is empty
            if (w.from_latent && e == w.events - 1) std::fill(own, own + END_OF_CHUNK, -INFINITY);  // none is longer
            const int64_t at = index[row] * w.events + e;
            w.emitted[at] = symbol[index[row]] = pick(own, w.u[at], w.temperature, w.top_p);
        }
    }

    // The byte just written, through the encoder.
    template <int L>
    void read(int64_t e, const int64_t* index, int64_t rows) {
        const int64_t width = w.encoder.d;
        Group<L> group(w.encoder, index, rows, e ? never.data() : w.doc_start, e ? never.data() : w.starts);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < width; i++) group.x[i * L + row] = w.read[symbol[index[row]] * width + i];
        group.run();
        group.collect(group.normed, width, w.feature);
        for (int64_t row = 0; row < rows; row++) {
            std::copy_n(w.feature + index[row] * width, width, feature_at(index[row], e));
            length[index[row]] = e + 1;
        }
    }

    float* feature_at(int64_t row, int64_t e) const { return w.features + (row * (w.events - 1) + e) * w.encoder.d; }

    // hldm.model.readouts.MeanReadout: every byte's part in the mean, whoever's it is, L bytes at a time.
    void find_latents(int64_t begin, int64_t rows) {
        const int64_t width = w.encoder.d, k = w.pooled;
        const float* const* p = w.to_latent;
        std::vector<std::pair<int64_t, int64_t>> bytes;
        for (int64_t row = begin; row < begin + rows; row++)
            for (int64_t e = 0; e < length[row]; e++) bytes.push_back({row, e});
        std::vector<float> pooled(rows * k), raw(w.z);
        in_groups(bytes.size(), [&](auto lanes, int64_t from, int64_t count) {
            constexpr int L = decltype(lanes)::value;
            std::vector<float> read((width + k) * L, 0.0f);
            float* placed = read.data() + width * L;
            for (int64_t lane = 0; lane < count; lane++) {
                const float* feature = feature_at(bytes[from + lane].first, bytes[from + lane].second);
                for (int64_t i = 0; i < width; i++) read[i * L + lane] = feature[i];
            }
            linear<L>(p, read.data(), placed, k, width);
            for (int64_t lane = 0; lane < count; lane++)
                for (int64_t i = 0; i < k; i++) placed[i * L + lane] += p[4][bytes[from + lane].second * k + i];
            gelu_all(placed, k * L);
            for (int64_t lane = 0; lane < count; lane++) {
                const int64_t row = bytes[from + lane].first;
                const float share = 1.0f / length[row];
                for (int64_t i = 0; i < k; i++) pooled[(row - begin) * k + i] += share * placed[i * L + lane];
            }
        });
        for (int64_t row = 0; row < rows; row++) {
            linear<1>(p + 2, &pooled[row * k], raw.data(), w.z, k);
            for (int64_t j = 0; j < w.z; j++) w.latents[(begin + row) * w.z + j] = (raw[j] - p[5][j]) / p[6][j];
        }
    }

    // The trunk reads the feature at the last byte and the mean over all.
    template <int L>
    void step_trunk(const int64_t* index, int64_t rows) {
        const int64_t width = w.encoder.d;
        std::vector<float> summary(2 * width * L, 0.0f);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < width; i++) {
                float sum = 0;
                for (int64_t e = 0; e < length[index[row]]; e++) sum += feature_at(index[row], e)[i];
                summary[i * L + row] = w.feature[index[row] * width + i];
                summary[(width + i) * L + row] = sum / length[index[row]];
            }
        Group<L> group(w.trunk, index, rows, w.doc_start, w.doc_start);
        linear<L>(w.to_trunk, summary.data(), group.x, w.trunk.d, 2 * width);
        group.run();
        group.collect(group.normed, w.trunk.d, w.trunk_output);
    }

    void run(int64_t begin, int64_t rows) {
        std::vector<int64_t> all(rows);
        std::iota(all.begin(), all.end(), begin);
        std::vector<int64_t> live = all;
        for (int64_t e = 0; e < w.events && !live.empty(); e++) {
            in_groups(live.size(), [&](auto lanes, int64_t first, int64_t count) {
                emit<decltype(lanes)::value>(e, &live[first], count);
            });
            const auto has_ended = [&](int64_t row) { return symbol[row] >= END_OF_CHUNK; };
            live.erase(std::remove_if(live.begin(), live.end(), has_ended), live.end());
            if (!w.read || e == w.events - 1) continue;
            in_groups(live.size(), [&](auto lanes, int64_t first, int64_t count) {
                read<decltype(lanes)::value>(e, &live[first], count);
            });
        }
        if (w.to_latent) find_latents(begin, rows);
        if (w.to_trunk)
            in_groups(rows, [&](auto lanes, int64_t first, int64_t count) {
                step_trunk<decltype(lanes)::value>(&all[first], count);
            });
    }
};

}  // namespace

extern "C" void hldm_write(const Writing* writing) {
    Writer writer(*writing);
    over_threads(writing->rows, writing->threads,
                 [&](int64_t begin, int64_t rows) { writer.run(begin, rows); });
}
