// What hldm.kernels.write hands over, and how a symbol is drawn.
#pragma once

#include "stretch.h"

namespace {

constexpr int64_t OUTPUTS = 258, END_OF_CHUNK = 256;  // and 257, the end of the document

// d, w: widths of decoder and encoder
struct Writing {
    int64_t rows, events, z, placed, pooled, known_width, threads;  // placed, pooled: within the readouts from and to latents
    double temperature, top_p, floor;  // floor: share of the probability that all symbols have alike
    Stack decoder, encoder, trunk;     // the twin has the decoder alone
    const float *write, *read;         // (v d), (v w) embeddings
    const float* const* outputs;       // weight (258 d), bias
    const float* const* from_latent;   // inner (placed z), bias, place (events placed), outer (d placed), bias; or none
    const float* const* from_text;     // weight (d w), bias; none where bytes are not read
    const float* const* from_trunk;    // weight (d known_width), bias; none without a trunk
    const float* const* to_latent;     // both layers, each with its bias, place, mean, deviation; none: not by their mean
    const float* const* to_trunk;      // weight (. 2w), bias; none without a trunk
    const float *latent, *before;      // (b z) to be written; (b known_width) what is known before it, of the trunk
    const float* u;                    // (b events) in [0, 1)
    const uint8_t *doc_start, *resets, *starts;  // (b) of the first event: a document's; the decoder's
    const int64_t* symbol;             // (b) before the first event
    int64_t* emitted;                  // (b events)
    float *feature, *features;         // (b w) of the encoder at the last byte, in and out; (b events-1 w) at each written
    float *latents, *trunk_output;     // (b z), (b .) of the chunks written
    // A few rows are written each by itself (stretch.h), by weights in panels; none: all rows together.
    Stack decoder_panels, encoder_panels;
    const float* const* panels;        // outputs and bias, outer of from_latent and bias, from_text and bias
    int64_t guesses;                   // of a draft and a pass, at most; 0: no draft
    int64_t strings, contexts;         // of the latent model's draft, of the twin's; the other 0
    const float* terms;                // (2z + 1, strings) of their scores
    const int64_t* string_at;          // (strings + 1) where each begins in the text
    const uint8_t* string_text;
    const int64_t* context_keys;       // (contexts), from the least
    const uint8_t* context_next;       // (contexts)
    int64_t* history;                  // (b) of the twin's text
    int64_t* counts;                   // (4) passes, events, guesses, and those that were right
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

}  // namespace
