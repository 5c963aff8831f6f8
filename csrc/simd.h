/* The dense loops of the sampler, over blocks of 64 logits. `struct simd` holds one compiled copy of them: simd_any
 * for any machine, simd_avx2 for x86 with AVX2. All copies return the same bits. */

#ifndef TOAI_SIMD_H
#define TOAI_SIMD_H

#include <stdint.h>

#if (defined(__x86_64__) || defined(__i386__)) && !defined(TOAI_PORTABLE)
#define HAVE_AVX2_COPY 1
#endif

enum {
    BLOCK = 64,
    N_BUCKETS = 1024,
};

/* What makes a weight of a logit: exp((x - top) / T). */
struct softmax {
    float top;             /* the greatest logit */
    float rate, rate_rest; /* log2(e) / T, and what rounding it lost */
    float farthest;        /* x - top where the weight is 0 */
};

/* The loops; simd_loops.h says what each one computes. */
struct simd {
    int (*scan)(const float *x, int32_t n_blocks, float *block_max);
    uint64_t (*at_least)(const float *x, float low);
    float (*softmax_block)(const float *x, const struct softmax *softmax, float low, float *e);
    void (*buckets)(const float *x, float top, float per_unit, int32_t *index);
    void (*mask)(float *x, uint64_t allowed);
};

extern const struct simd simd_any;
#ifdef HAVE_AVX2_COPY
extern const struct simd simd_avx2;
#endif

/* The fastest copy that this machine can run. */
struct simd simd_best(void);

/* For a temperature greater than 0. */
static inline struct softmax softmax_at(double temperature, float top)
{
    double rate = 0x1.71547652b82fep+0 / temperature; /* log2(e) */
    return (struct softmax){top, (float)rate, (float)(rate - (double)(float)rate), (float)(-127.0 / rate)};
}

/* The bucket of a logit by its distance from the greatest. Never falls as x falls: a rounded difference, a rounded
 * product and a truncation all keep the order. */
static inline int32_t bucket_of(float x, float top, float per_unit)
{
    float at = (top - x) * per_unit;
    return (int32_t)(at < (float)(N_BUCKETS - 1) ? at : (float)(N_BUCKETS - 1));
}

#endif
