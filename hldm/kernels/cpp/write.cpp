// Symbols of a whole chunk, or of a stretch of the twin's, for hldm.kernels.write: decoder, draw and encoder in turns until
// every row has ended. A row that has ended leaves the groups, and its state stays as it is. Then the chunks' latents, and
// the trunk's step. A few rows are written one by one, several symbols a pass where a draft has guessed them.

#include <numeric>

#include "guessing.h"

namespace {

struct Writer {
    const Writing& w;
    std::vector<uint8_t> never;  // flags of all events but the first
    std::vector<int64_t> symbol, length;  // the latest, and how many bytes were read back
    std::vector<float> known, inner;      // (b d) what the trunk adds to every event, or none; (b placed) of the latent

    explicit Writer(const Writing& w)
        : w(w), never(w.rows, 0), symbol(w.symbol, w.symbol + w.rows), length(w.rows, 0),
          known(w.from_trunk ? w.rows * w.decoder.d : 0), inner(w.rows * w.placed) {}

    // What stays the same for a chunk.
    template <int L>
    void tell(const int64_t* index, int64_t rows) {
        const int64_t d = w.decoder.d;
        const auto product = [&](const float* const* p, const float* from, int64_t in, int64_t out, bool fades, float* to) {
            std::vector<float> x(in * L, 0.0f), y(out * L);
            for (int64_t row = 0; row < rows; row++)
                for (int64_t i = 0; i < in && !(fades && w.doc_start[index[row]]); i++)
                    x[i * L + row] = from[index[row] * in + i];
            linear<L>(p, x.data(), y.data(), out, in);
            for (int64_t row = 0; row < rows; row++)
                for (int64_t i = 0; i < out; i++) to[index[row] * out + i] = y[i * L + row];
        };
        if (w.from_trunk) product(w.from_trunk, w.before, w.known_width, d, true, known.data());
        if (w.from_latent) product(w.from_latent, w.latent, w.z, w.placed, false, inner.data());
    }

    // Draw event e of a row from logits, which are written over.
    int64_t draw(int64_t row, int64_t e, float* logits) {
        if (w.floor > 0) raise(logits, w.floor);
        bar(e, logits);
        return pick(logits, w.u[row * w.events + e], w.temperature, w.top_p);
    }

    // What may not be at an event: no chunk is empty, none is longer, and the twin has none
    void bar(int64_t e, float* logits) const {
        if (!w.from_latent) logits[END_OF_CHUNK] = -INFINITY;
        if (w.from_latent && e == 0) std::fill(logits + END_OF_CHUNK, logits + OUTPUTS, -INFINITY);
        if (w.from_latent && e == w.events - 1) std::fill(logits, logits + END_OF_CHUNK, -INFINITY);
    }

    // Event e of a group: one position of the decoder, and a symbol for each row.
    template <int L>
    void emit(int64_t e, const int64_t* index, int64_t rows) {
        const int64_t d = w.decoder.d, width = w.encoder.d, k = w.placed;
        static thread_local std::vector<float> lanes;
        lanes.assign((width + 2 * d + k + OUTPUTS) * L, 0.0f);
        float *feature = lanes.data(), *text = feature + width * L, *logits = text + d * L;
        float *placed = logits + OUTPUTS * L, *given = placed + k * L;
        Group<L> group(w.decoder, index, rows, e ? never.data() : w.resets, e ? never.data() : w.starts);
        if (w.from_text) {
            for (int64_t row = 0; row < rows; row++)
                for (int64_t i = 0; i < width; i++) feature[i * L + row] = w.feature[index[row] * width + i];
            linear<L>(w.from_text, feature, text, d, width);
        }
        if (w.from_latent) {  // hldm.model.readouts.PlacedReadout
            for (int64_t row = 0; row < rows; row++)
                for (int64_t i = 0; i < k; i++)
                    placed[i * L + row] = inner[index[row] * k + i] + w.from_latent[2][e * k + i];
            gelu_all(placed, k * L);
            linear<L>(w.from_latent + 3, placed, given, d, k);
        }
        for (int64_t row = 0; row < rows; row++) {
            const float* embedded = w.write + symbol[index[row]] * d;
            const float* trunk = w.from_trunk ? &known[index[row] * d] : nullptr;
            const bool reads = w.from_text && (e || !w.doc_start[index[row]]);
            for (int64_t i = 0; i < d; i++)
                group.x[i * L + row] = embedded[i] + given[i * L + row] + (trunk ? trunk[i] : 0) + (reads ? text[i * L + row] : 0);
        }
        group.run();
        linear<L>(w.outputs, group.normed, logits, OUTPUTS, d);

        for (int64_t row = 0; row < rows; row++) {
            float own[OUTPUTS];
            for (int64_t i = 0; i < OUTPUTS; i++) own[i] = logits[i * L + row];
            w.emitted[index[row] * w.events + e] = symbol[index[row]] = draw(index[row], e, own);
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

    // ---- one row by itself

    // The inputs of the decoder at events e, e + 1, ... of a row, where it reads `symbols`, and at each the feature before.
    void feed(Stretch& decoder, int64_t row, int64_t e, const int64_t* symbols, const float* features, int64_t positions) {
        const int64_t d = w.decoder.d, k = w.placed, by_feature = padded(w.encoder.d);
        static thread_local std::vector<float> numbers;
        numbers.assign(MOST * (2 * decoder.by + padded(k)), 0.0f);
        float *text = numbers.data(), *given = text + MOST * decoder.by, *placed = given + MOST * decoder.by;
        if (w.from_text) linear_all(w.panels + 4, features, by_feature, text, decoder.by, d, w.encoder.d, positions);
        if (w.from_latent) {
            for (int64_t n = 0; n < positions; n++) {
                for (int64_t i = 0; i < k; i++)
                    placed[n * k + i] = inner[row * k + i] + w.from_latent[2][(e + n) * k + i];
            }
            gelu_all(placed, positions * k);
            linear_all(w.panels + 2, placed, k, given, decoder.by, d, k, positions);
        }
        const float* trunk = w.from_trunk ? &known[row * d] : nullptr;
        for (int64_t n = 0; n < positions; n++) {
            const float* embedded = w.write + symbols[n] * d;
            const bool reads = w.from_text && (e + n || !w.doc_start[row]);
            const int64_t at = n * decoder.by;
            for (int64_t i = 0; i < d; i++)
                decoder.x[at + i] = embedded[i] + given[at + i] + (trunk ? trunk[i] : 0) + (reads ? text[at + i] : 0);
        }
    }

    // All events of a row, in passes: the encoder reads the byte before and the guesses, the decoder says what comes after
    // each, and what was right of the guesses stays.
    void write_alone(int64_t row) {
        const int64_t width = w.encoder.d, by = padded(width);
        static thread_local std::vector<float> memory[2];  // as it was left: to clear it took longer than a step
        Stretch decoder(w.decoder_panels, row, memory[0]);
        Stretch encoder(w.read ? w.encoder_panels : w.decoder_panels, row, memory[1]);
        Draft draft(w, row);
        std::vector<float> features((MOST + 1) * by, 0.0f);  // of the encoder before each position of a pass
        int64_t symbols[MOST + 1], e = 0;
        if (w.feature) std::copy_n(w.feature + row * width, width, features.data());
        while (e < w.events) {
            symbols[0] = symbol[row];
            const int64_t guesses = draft.guess(std::min(w.guesses, w.events - 1 - e), symbols + 1);
            // An end is a guess that nobody reads.
            const int64_t positions = 1 + guesses - (guesses && symbols[guesses] >= END_OF_CHUNK);
            const int64_t read = w.read ? positions - (e == 0) : 0;  // bytes, from the one before event e on
            const int64_t skipped = e == 0;  // positions whose feature is there already
            if (read) {
                for (int64_t n = 0; n < read; n++)
                    std::copy_n(w.read + symbols[skipped + n] * width, width, encoder.x + n * encoder.by);
                const bool first = e <= 1;  // byte 0 of the chunk
                encoder.run(read, first && w.doc_start[row], first && w.starts[row]);
                for (int64_t n = 0; n < read; n++)
                    std::copy_n(encoder.normed + n * encoder.by, width, &features[(skipped + n) * by]);
            }
            feed(decoder, row, e, symbols, features.data(), positions);
            decoder.run(positions, e == 0 && w.resets[row], e == 0 && w.starts[row]);
            static thread_local std::vector<float> logits;
            const int64_t by_logits = padded(OUTPUTS);
            logits.resize(MOST * by_logits);
            linear_all(w.panels, decoder.normed, decoder.by, logits.data(), by_logits, OUTPUTS, w.decoder.d, positions);
            int64_t right = 0;  // guesses
            bool has_ended = false;
            for (int64_t n = 0; n < positions; n++) {
                const int64_t found = draw(row, e + n, &logits[n * by_logits]);
                w.emitted[row * w.events + e + n] = symbol[row] = found;
                draft.take(found);
                has_ended = found >= END_OF_CHUNK;
                if (n < guesses && found == symbols[1 + n]) right++;
                if (has_ended || n >= guesses || found != symbols[1 + n]) break;
            }
            const int64_t events = std::min(right + 1, positions);
            decoder.commit(events);
            const int64_t bytes = w.read ? std::max<int64_t>(0, events - skipped) : 0;  // read of those that stay
            if (bytes > 0) {
                encoder.commit(bytes);
                for (int64_t n = 0; n < bytes; n++)
                    std::copy_n(&features[(skipped + n) * by], width, feature_at(row, e + skipped + n - 1));
                length[row] = e + events - 1;
                std::copy_n(feature_at(row, length[row] - 1), width, w.feature + row * width);
            }
            if (w.counts) w.counts[0]++, w.counts[1] += events, w.counts[2] += guesses, w.counts[3] += right;
            e += events;
            if (has_ended) break;
        }
    }

    void run(int64_t begin, int64_t rows) {
        std::vector<int64_t> all(rows);
        std::iota(all.begin(), all.end(), begin);
        in_groups(rows, [&](auto lanes, int64_t first, int64_t count) { tell<decltype(lanes)::value>(&all[first], count); });
        std::vector<int64_t> live = all;
        if (w.panels) {
            for (int64_t row : all) write_alone(row);
            live.clear();
        }
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
