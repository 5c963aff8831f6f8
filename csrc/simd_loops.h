/* The dense inner loops, over blocks of 64 logits, as many lanes at a time as one register holds. simd.c includes
 * this twice: once for any machine with registers of 16 bytes, as SSE2 and NEON have, and once with AVX2 allowed.
 * Sums and maxima use eight lanes in both, which are two registers here and one there: both copies run the same
 * operations in the same order (no fused multiply-add), so that a seed gives the same ids on every machine. One
 * type of eight lanes for both would be simpler, but GCC compares vectors wider than a register lane by lane,
 * which made it four times slower.
 *
 * Before each inclusion: SIMD(name) names a function or type, SIMD_TARGET holds its attributes, and SIMD_AVX2 is
 * defined for the AVX2 copy. Has no state and no knowledge of sampling. */

#ifdef SIMD_AVX2
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define PARTS (8 / WIDTH)
#define VF SIMD(vf)
#define VI SIMD(vi)

typedef float VF __attribute__((vector_size(4 * WIDTH)));
typedef int32_t VI __attribute__((vector_size(4 * WIDTH)));

static inline SIMD_TARGET VF SIMD(load)(const float *x)
{
    VF v;
    memcpy(&v, x, sizeof v);
    return v;
}

static inline SIMD_TARGET VF SIMD(all)(float x)
{
    return x - (VF){0};
}

static inline SIMD_TARGET VF SIMD(pick)(VI mask, VF yes, VF no)
{
    return (VF)(((VI)yes & mask) | ((VI)no & ~mask));
}

static inline SIMD_TARGET VF SIMD(max)(VF a, VF b)
{
#ifdef SIMD_AVX2
    return (VF)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return SIMD(pick)(a > b, a, b);
#endif
}

/* Writes the greatest value of each of n_blocks blocks. Returns 0 if x holds a NaN or +inf, else 1. */
static SIMD_TARGET int SIMD(scan)(const float *x, int32_t n_blocks, float *block_max)
{
    const VF infinity = SIMD(all)(INFINITY);
    VI sound = infinity == infinity;
    for (int32_t b = 0; b < n_blocks; b++, x += BLOCK) {
        VF top[PARTS];
        for (int part = 0; part < PARTS; part++) {
            top[part] = SIMD(load)(x + part * WIDTH);
            sound &= top[part] < infinity;
        }
        for (int i = 8; i < BLOCK; i += 8) {
            for (int part = 0; part < PARTS; part++) {
                VF v = SIMD(load)(x + i + part * WIDTH);
                sound &= v < infinity;
                top[part] = SIMD(max)(v, top[part]);
            }
        }
        float lane[8];
        memcpy(lane, top, sizeof lane);
        float best = lane[0];
        for (int i = 1; i < 8; i++)
            best = lane[i] > best ? lane[i] : best;
        block_max[b] = best;
    }
    int all = 1;
    for (int i = 0; i < WIDTH; i++)
        all &= sound[i];
    return all;
}

/* Returns a word whose bit i is 1 if x[i] >= low. */
static SIMD_TARGET uint64_t SIMD(at_least)(const float *x, float low)
{
    const VF bound = SIMD(all)(low);
    uint64_t bits = 0;
#ifdef SIMD_AVX2
    for (int i = 0; i < BLOCK; i += 8)
        bits |= (uint64_t)_mm256_movemask_ps((__m256)(SIMD(load)(x + i) >= bound)) << i;
#else
    VI seen = {0}; /* in lane j, bit i is for x[4 i + j]: a comparison that holds is -1 */
    for (int i = BLOCK - 4; i >= 0; i -= 4)
        seen = seen + seen - (SIMD(load)(x + i) >= bound);
    for (int j = 0; j < 4; j++) {
        uint64_t spread = (uint32_t)seen[j]; /* its 16 bits, moved to every fourth bit */
        spread = (spread | spread << 24) & 0x000000ff000000ff;
        spread = (spread | spread << 12) & 0x000f000f000f000f;
        spread = (spread | spread << 6) & 0x0303030303030303;
        spread = (spread | spread << 3) & 0x1111111111111111;
        bits |= spread << j;
    }
#endif
    return bits;
}

/* e[i] = exp((x[i] - top) / T) where x[i] >= low, else 0; returns their sum. x <= top.
 *
 * exp((x - top) / T) = 2^z = 2^k * 2^f, where k is the whole number nearest z, so that |f| <= 1/2. The rate that makes
 * z of x - top, log2(e) / T, has two parts, because an error in it would tilt all weights the same way and so move the
 * cut of top_p. Its second part is added to the small f, since the large z would round it away. The polynomial is the
 * one of its degree that comes closest to 2^f in the ratio, among those with coefficients that are floats: within 3e-9,
 * a twentieth of a float's rounding. Below z = -126.5 the weight is 0, which -inf must give too: x - top stops where
 * k = -127, whose bits as an exponent are those of 0. `round` leaves k + 127 in the low bits of a sum. */
static SIMD_TARGET float SIMD(softmax_block)(const float *x, const struct softmax *softmax, float low, float *e)
{
    const VF bound = SIMD(all)(low), tops = SIMD(all)(softmax->top), farthest = SIMD(all)(softmax->farthest);
    const VF rate = SIMD(all)(softmax->rate), rest = SIMD(all)(softmax->rate_rest);
    const VF round = SIMD(all)(12582912.0f + 127.0f); /* 1.5 * 2^23 + 127 */
    VF sums[PARTS] = {0};
    for (int i = 0; i < BLOCK; i += WIDTH) {
        VF v = SIMD(load)(x + i);
        VF d = SIMD(max)(v - tops, farthest);
        VF z = d * rate;
        VF shifted = z + round;
        VF f = (z - (shifted - round)) + d * rest;
        VF f2 = f * f;
        VF p = f2 * 0x1.416b60p-13f + (f * 0x1.5f082ep-10f + 0x1.3b2de0p-7f);
        p = p * f2 + (f * 0x1.c6af7cp-5f + 0x1.ebfbdcp-3f);
        p = p * f2 + (f * 0x1.62e430p-1f + 1.0f);
        p = (VF)((VI)(p * (VF)((VI)shifted << 23)) & (v >= bound));
        memcpy(e + i, &p, sizeof p);
        sums[i / WIDTH % PARTS] += p;
    }
    float sum[8];
    memcpy(sum, sums, sizeof sum);
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

/* index[i] = bucket_of(x[i]). */
static SIMD_TARGET void SIMD(buckets)(const float *x, float top, float per_unit, int32_t *index)
{
    const VF tops = SIMD(all)(top), last = SIMD(all)(N_BUCKETS - 1);
    for (int i = 0; i < BLOCK; i += WIDTH) {
        VF at = (tops - SIMD(load)(x + i)) * per_unit;
        at = SIMD(pick)(at < last, at, last);
        VI whole = __builtin_convertvector(at, VI);
        memcpy(index + i, &whole, sizeof whole);
    }
}

/* Sets x[i] to -inf where bit i of `allowed` is 0. */
static SIMD_TARGET void SIMD(mask)(float *x, uint64_t allowed)
{
    VI bit;
    for (int i = 0; i < WIDTH; i++)
        bit[i] = 1 << i;
    for (int i = 0; i < BLOCK; i += WIDTH) {
        VI keep = ((int32_t)(allowed >> i & 0xff) & bit) == bit;
        VF v = SIMD(pick)(keep, SIMD(load)(x + i), SIMD(all)(-INFINITY));
        memcpy(x + i, &v, sizeof v);
    }
}

#undef WIDTH
#undef PARTS
#undef VF
#undef VI
