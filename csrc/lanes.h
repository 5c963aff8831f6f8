/* The dense inner loops, over blocks of 64 logits, eight lanes at a time. Included twice by sampler.c: once for
 * any machine and once with AVX2 allowed, under two suffixes. Both copies run the same operations in the same
 * order (no fused multiply-add), so that a seed gives the same ids on every machine.
 *
 * Before each inclusion: LANES(name) names a function, LANES_TARGET holds its attributes, and LANES_AVX2 is
 * defined for the AVX2 copy. Owns no state and knows nothing of sampling. */

static inline LANES_TARGET v8f LANES(load)(const float *x)
{
    v8f v;
    memcpy(&v, x, sizeof v);
    return v;
}

static inline LANES_TARGET v8f LANES(all)(float x)
{
    return (v8f){x, x, x, x, x, x, x, x};
}

static inline LANES_TARGET v8f LANES(pick)(v8i mask, v8f yes, v8f no)
{
    return (v8f)(((v8i)yes & mask) | ((v8i)no & ~mask));
}

static inline LANES_TARGET v8f LANES(max)(v8f a, v8f b)
{
#ifdef LANES_AVX2
    return (v8f)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return LANES(pick)(a > b, a, b);
#endif
}

/* One bit per lane of a comparison's result. */
static inline LANES_TARGET uint64_t LANES(bits)(v8i mask)
{
#ifdef LANES_AVX2
    return (uint64_t)_mm256_movemask_ps((__m256)mask);
#else
    uint64_t bits = 0;
    for (int i = 0; i < 8; i++)
        bits |= (uint64_t)(mask[i] & 1) << i;
    return bits;
#endif
}

/* The greatest value of each of n_blocks blocks. Returns 0 if a NaN or +inf was met, else 1. */
static LANES_TARGET int LANES(scan)(const float *x, int32_t n_blocks, float *block_max)
{
    const v8f infinity = LANES(all)(INFINITY);
    v8i sound = infinity == infinity;
    for (int32_t b = 0; b < n_blocks; b++, x += BLOCK) {
        v8f top = LANES(load)(x);
        sound &= top < infinity;
        for (int i = 8; i < BLOCK; i += 8) {
            v8f v = LANES(load)(x + i);
            sound &= v < infinity;
            top = LANES(max)(v, top);
        }
        float best = top[0];
        for (int i = 1; i < 8; i++)
            best = top[i] > best ? top[i] : best;
        block_max[b] = best;
    }
    return LANES(bits)(sound) == 0xff;
}

/* Bit i says x[i] >= low. */
static LANES_TARGET uint64_t LANES(at_least)(const float *x, float low)
{
    const v8f bound = LANES(all)(low);
    uint64_t bits = 0;
    for (int i = 0; i < BLOCK; i += 8)
        bits |= LANES(bits)(LANES(load)(x + i) >= bound) << i;
    return bits;
}

/* e[i] = exp((x[i] - top) / T) where x[i] >= low, else 0; returns their sum. x <= top.
 *
 * exp(z) = 2^k * exp(r), k the whole number nearest z / ln 2, so that |r| <= ln(2)/2. Two factors come in two
 * parts, because an error in either would tilt all weights the same way and so move the cut of top_p: ln 2, whose
 * first part has few enough bits for k times it to be exact, and 1/T, whose second part is what its rounding to a
 * float lost. The second parts are added to the small r, since the large z would round them away. The series for
 * exp(r) stops after r^7/7!: what is left out is under 6e-9 of it, a tenth of a float's rounding. Below z = -87
 * the weight is 0 (2^k would leave the range of normal floats), which is also what -inf must give; z stops at -88
 * to keep k in range. */
static LANES_TARGET float LANES(weigh)(const float *x, float top, float rate, float rate_rest, float low, float *e)
{
    const v8f bound = LANES(all)(low), tops = LANES(all)(top);
    const v8f hi = LANES(all)(rate), lo = LANES(all)(rate_rest);
    const v8f round = LANES(all)(12582912.0f); /* 1.5 * 2^23: adding it leaves a whole number in the low bits */
    v8f sum = LANES(all)(0.0f);
    for (int i = 0; i < BLOCK; i += 8) {
        v8f v = LANES(load)(x + i);
        v8f d = v - tops;
        v8f z = LANES(max)(d * hi, LANES(all)(-88.0f));
        v8f shifted = z * 1.44269504f + round;
        v8f k = shifted - round;
        v8f r = (z - k * 0.693359375f) + (d * lo + k * 2.12194440e-4f);
        v8f p = r * (1.0f / 5040) + 1.0f / 720;
        p = p * r + 1.0f / 120;
        p = p * r + 1.0f / 24;
        p = p * r + 1.0f / 6;
        p = p * r + 0.5f;
        p = p * r + 1.0f;
        p = p * r + 1.0f;
        v8i power = ((v8i)shifted - (v8i)round + 127) << 23;
        v8i keep = (v >= bound) & (z >= LANES(all)(-87.0f));
        p = (v8f)((v8i)(p * (v8f)power) & keep);
        memcpy(e + i, &p, sizeof p);
        sum += p;
    }
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

/* index[i] = the bucket of x[i]: bucket_of() of sampler.c, eight at a time. */
static LANES_TARGET void LANES(buckets)(const float *x, float top, float per_unit, int32_t *index)
{
    const v8f tops = LANES(all)(top), last = LANES(all)(N_BUCKETS - 1);
    for (int i = 0; i < BLOCK; i += 8) {
        v8f at = (tops - LANES(load)(x + i)) * per_unit;
        at = LANES(pick)(at < last, at, last);
        v8i whole = __builtin_convertvector(at, v8i);
        memcpy(index + i, &whole, sizeof whole);
    }
}
