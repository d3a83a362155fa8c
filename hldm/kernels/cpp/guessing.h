// A draft's guesses (hldm.generation.draft): what the decoder of one row may write next.
#pragma once

#include "writing.h"

namespace {

struct Draft {
    const Writing& w;
    int64_t row;
    int64_t first = 0, end = 0, done = 0;  // strings that begin with the `done` symbols written of this chunk
    uint64_t history = 0;                  // the twin's text, its last byte lowest

    Draft(const Writing& w, int64_t row) : w(w), row(row) {
        if (w.strings) score();
        if (w.contexts) history = w.doc_start[row] ? 0 : uint64_t(w.history[row]);
    }

    static std::vector<float>& scores() {
        static thread_local std::vector<float> numbers;
        return numbers;
    }

    // ChunkDraft.scores
    void score() {
        const int64_t n = end = w.strings;
        scores().resize(n);
        float* __restrict to = scores().data();
        std::copy_n(w.terms, n, to);
        for (int64_t j = 0; j < w.z; j++) {
            const float z = w.latent[row * w.z + j], square = z * z;
            const float *linear = w.terms + (1 + 2 * j) * n, *quadratic = linear + n;
            for (int64_t i = 0; i < n; i++) to[i] += z * linear[i] + square * quadratic[i];
        }
    }

    // The symbol of string i at a place, its end included.
    int64_t at(int64_t i, int64_t place) const {
        const int64_t from = w.string_at[i] + place;
        return from < w.string_at[i + 1] ? w.string_text[from] : -1;
    }

    // Up to `most` symbols after those that were taken in; returns how many.
    int64_t guess(int64_t most, int64_t* guesses) const {
        int64_t made = 0;
        if (w.strings && first < end) {
            int64_t best = first;
            for (int64_t i = first; i < end; i++)
                if (scores()[i] > scores()[best]) best = i;
            for (bool ends = false; made < most && !ends; made++) {
                const int64_t symbol = at(best, done + made);
                ends = symbol < 0;
                guesses[made] = ends ? END_OF_CHUNK : symbol;
            }
        }
        uint64_t text = history;
        while (w.contexts && made < most) {
            const int64_t found = look_up(text);
            if (found < 0) break;
            guesses[made++] = found;
            text = text << 8 | uint64_t(found);
        }
        return made;
    }

    // TextDraft.look_up: of the longest context that is known
    int64_t look_up(uint64_t text) const {
        for (uint64_t order = 7; order > 0; order--) {
            const int64_t key = int64_t(order << 56 | (text & ((uint64_t(1) << 8 * order) - 1)));
            const int64_t* found = std::lower_bound(w.context_keys, w.context_keys + w.contexts, key);
            if (found != w.context_keys + w.contexts && *found == key) return w.context_next[found - w.context_keys];
        }
        return -1;
    }

    // One symbol that was written.
    void take(int64_t symbol) {
        history = (history << 8 | uint64_t(symbol & 255)) & ((uint64_t(1) << 56) - 1);
        if (w.contexts) w.history[row] = int64_t(history);
        if (!w.strings || symbol >= END_OF_CHUNK) return;
        const auto bound = [&](int64_t least) {  // the first string with at least this symbol
            int64_t low = first, high = end;
            while (low < high) {
                const int64_t middle = (low + high) / 2;
                if (at(middle, done) < least) low = middle + 1;
                else high = middle;
            }
            return low;
        };
        const int64_t begin = bound(symbol);
        end = bound(symbol + 1), first = begin, done++;
    }
};

}  // namespace
