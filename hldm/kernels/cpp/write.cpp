// Symbols of a whole chunk, or of a stretch of the twin's, for hldm.kernels.write: decoder, draw and encoder in turns until
// every row has ended. A row that has ended leaves the groups, and its state stays as it is.

#include <limits>
#include <numeric>

#include "stack.h"

namespace {

constexpr int64_t OUTPUTS = 258, END_OF_CHUNK = 256;  // and 257, the end of the document

struct Writing {
    int64_t rows, events, places, threads;
    double temperature, top_p;
    Stack decoder, encoder;
    const float *write, *known;                      // (v d) embedding, (b d) or none: what the trunk tells every event
    const float *inner, *place, *outer, *outer_bias; // (b k) or none for the twin, (events k), (d k), (d): told by latents
    const float *outputs, *outputs_bias;             // (258 d), (258)
    const float *read, *from_text, *from_text_bias;  // (v w) embedding, (d w), (d); none where bytes are not read
    const float* u;                                  // (b events) in [0, 1)
    const uint8_t *doc_start, *resets, *starts;      // (b) of the first event: a document's; the decoder's
    const int64_t* symbol;                           // (b) before the first event
    float* feature;                                  // (b w) of the encoder at the last byte
    int64_t* emitted;                                // (b events)
    float* features;                                 // (b events-1 w) of the encoder at each byte written
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

struct Writer {
    const Writing& w;
    std::vector<uint8_t> never;  // flags of all events but the first
    std::vector<int64_t> symbol;

    explicit Writer(const Writing& w) : w(w), never(w.rows, 0), symbol(w.symbol, w.symbol + w.rows) {}

    // Event e of a group: one position of the decoder, and a symbol for each row.
    template <int L>
    void emit(int64_t e, const int64_t* index, int64_t rows) {
        const int64_t d = w.decoder.shape.d, width = w.encoder.shape.d, k = w.places;
        static thread_local std::vector<float> lanes;
        lanes.assign((width + 2 * d + k + OUTPUTS) * L, 0.0f);
        float *feature = lanes.data(), *text = feature + width * L, *logits = text + d * L;
        float *placed = logits + OUTPUTS * L, *told = placed + k * L;
        Group<L> group(w.decoder.shape, index, rows, e ? never.data() : w.resets, e ? never.data() : w.starts);
        if (w.from_text) {
            for (int64_t row = 0; row < rows; row++)
                for (int64_t i = 0; i < width; i++) feature[i * L + row] = w.feature[index[row] * width + i];
            multiply<L>(w.from_text, feature, text, d, width);
            add_bias<L>(w.from_text_bias, text, d);
        }
        if (w.inner) {  // hldm.model.readouts.PlacedReadout
            for (int64_t row = 0; row < rows; row++)
                for (int64_t i = 0; i < k; i++) placed[i * L + row] = w.inner[index[row] * k + i] + w.place[e * k + i];
            gelu_all(placed, k * L);
            multiply<L>(w.outer, placed, told, d, k);
            add_bias<L>(w.outer_bias, told, d);
        }
        for (int64_t row = 0; row < rows; row++) {
            const float* embedded = w.write + symbol[index[row]] * d;
            const float* known = w.known ? w.known + index[row] * d : nullptr;
            const bool reads = w.from_text && (e || !w.doc_start[index[row]]);
            for (int64_t i = 0; i < d; i++)
                group.x[i * L + row] = embedded[i] + told[i * L + row] + (known ? known[i] : 0) + (reads ? text[i * L + row] : 0);
        }
        group.run(w.decoder.is_recurrent, w.decoder.weights, w.decoder.rotation, w.decoder.state, w.decoder.state);
        multiply<L>(w.outputs, group.normed, logits, OUTPUTS, d);

        const float never_drawn = -std::numeric_limits<float>::infinity();
        for (int64_t row = 0; row < rows; row++) {
            float own[OUTPUTS];
            for (int64_t i = 0; i < OUTPUTS; i++) own[i] = logits[i * L + row] + w.outputs_bias[i];
            if (!w.inner) own[END_OF_CHUNK] = never_drawn;
            if (w.inner && e == 0) std::fill(own + END_OF_CHUNK, own + OUTPUTS, never_drawn);  // no chunk is empty
            if (w.inner && e == w.events - 1) std::fill(own, own + END_OF_CHUNK, never_drawn);  // none is longer
            const int64_t at = index[row] * w.events + e;
            w.emitted[at] = symbol[index[row]] = pick(own, w.u[at], w.temperature, w.top_p);
        }
    }

    // The byte just written, through the encoder.
    template <int L>
    void read(int64_t e, const int64_t* index, int64_t rows) {
        const int64_t width = w.encoder.shape.d;
        Group<L> group(w.encoder.shape, index, rows, e ? never.data() : w.doc_start, e ? never.data() : w.starts);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < width; i++) group.x[i * L + row] = w.read[symbol[index[row]] * width + i];
        group.run(w.encoder.is_recurrent, w.encoder.weights, w.encoder.rotation, w.encoder.state, w.encoder.state);
        group.collect(group.normed, width, w.feature);
        for (int64_t row = 0; row < rows; row++)
            std::copy_n(w.feature + index[row] * width, width,
                        w.features + (index[row] * (w.events - 1) + e) * width);
    }

    void run(int64_t begin, int64_t rows) {
        std::vector<int64_t> live(rows);
        std::iota(live.begin(), live.end(), begin);
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
    }
};

}  // namespace

extern "C" void hldm_write(const Writing* writing) {
    Writer writer(*writing);
    over_threads(writing->rows, writing->threads,
                 [&](int64_t begin, int64_t rows) { writer.run(begin, rows); });
}
