/* Gradients of softmax regression for many clients, one pass over each client's inputs.
 *
 * Products of a tall matrix with ten columns are far from a processor's limits in a general library. Here blocks of
 * ROWS examples go through both products while they are in the cache, and sums of GROUP classes stay in registers.
 * fedpriv/tasks/dense.py has the same operations, but not in the same order.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define TOGETHER 4 /* examples, or vectors of features, at once */
#define ALL(x) ((vector)_mm512_set1_ps(x))
#define MULTIPLY_ADD(a, b, c) ((vector)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#elif defined(__AVX__) && defined(__FMA__)
#include <immintrin.h>
#define LANES 8
#define TOGETHER 2
#define ALL(x) ((vector)_mm256_set1_ps(x))
#define MULTIPLY_ADD(a, b, c) ((vector)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#else
#define LANES 4
#define TOGETHER 2
#define ALL(x) ((vector){(x), (x), (x), (x)})
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif
/* A vector that is used again stays in a register; gcc would otherwise read it again from memory. */
#if defined(__AVX512F__)
#define KEEP(v) __asm__("" : "+v"(v))
#elif defined(__SSE__)
#define KEEP(v) __asm__("" : "+x"(v))
#else
#define KEEP(v) ((void)0)
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES)));

#define ROWS 16       /* examples in a block */
#define LINE 16       /* floats that memory sends at once */
#define GROUP 5       /* classes at once */
#define FEATURES 1024 /* at once: the weights of one group fit the cache */
#define MAX_CLASSES 64

/* Calls `use` with `count`, at most GROUP, as a constant. */
#define AS_CONSTANT(use, count)                                                                                        \
    switch (count) {                                                                                                   \
    case 1:                                                                                                            \
        use(1);                                                                                                        \
        break;                                                                                                         \
    case 2:                                                                                                            \
        use(2);                                                                                                        \
        break;                                                                                                         \
    case 3:                                                                                                            \
        use(3);                                                                                                        \
        break;                                                                                                         \
    case 4:                                                                                                            \
        use(4);                                                                                                        \
        break;                                                                                                         \
    default:                                                                                                           \
        use(GROUP);                                                                                                    \
    }

INLINE vector load(const float *at) {
    vector v;
    memcpy(&v, at, sizeof v);
    return v;
}

INLINE vector load_some(const float *at, size_t count) {
    vector v = {0.0f};
    memcpy(&v, at, count * sizeof *at);
    return v;
}

INLINE void store(float *at, vector v) { memcpy(at, &v, sizeof v); }

/* The sum of all lanes, the upper half added to the lower one again and again. */
INLINE float total(vector v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX__) && defined(__FMA__)
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return four[0] + four[1];
#else
    float lanes[LANES];
    store(lanes, v);
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            lanes[i] += lanes[i + n];
    return lanes[0];
#endif
}

INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* Adds the dot products of `rows` examples and `classes` weights over `size` features; both strides are `width`. */
INLINE void add_dots(const int rows, const int classes, const float *inputs, const float *weight, size_t width,
                     size_t size, float *logits) {
    vector sum[TOGETHER][GROUP];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < classes; k++)
            sum[r][k] = ALL(0.0f);
    size_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        vector x[TOGETHER];
        for (int r = 0; r < rows; r++)
            x[r] = load(inputs + (size_t)r * width + i);
        for (int k = 0; k < classes; k++) {
            vector w = load(weight + (size_t)k * width + i);
            KEEP(w);
            for (int r = 0; r < rows; r++)
                sum[r][k] = MULTIPLY_ADD(x[r], w, sum[r][k]);
        }
    }
    if (i < size)
        for (int k = 0; k < classes; k++) {
            vector w = load_some(weight + (size_t)k * width + i, size - i);
            for (int r = 0; r < rows; r++)
                sum[r][k] = MULTIPLY_ADD(load_some(inputs + (size_t)r * width + i, size - i), w, sum[r][k]);
        }
    for (int k = 0; k < classes; k++)
        for (int r = 0; r < rows; r++)
            logits[k * ROWS + r] += total(sum[r][k]);
}

/* logits[class][row] += weight inputs */
static void add_logits(size_t rows, size_t classes, const float *inputs, const float *weight, size_t width,
                       float *logits) {
    for (size_t start = 0; start < width; start += FEATURES) {
        const size_t size = least(width - start, FEATURES);
        for (size_t k = 0; k < classes; k += GROUP)
            for (size_t r = 0; r < rows; r += TOGETHER) {
                const float *x = inputs + r * width + start, *w = weight + k * width + start;
#define DOTS(of_rows, of_classes) add_dots(of_rows, of_classes, x, w, width, size, logits + k * ROWS + r)
#define MOST_DOTS(count) DOTS(TOGETHER, count)
#define ONE_DOTS(count) DOTS(1, count)
#define TWO_DOTS(count) DOTS(2, count)
#define THREE_DOTS(count) DOTS(3, count)
                const size_t some = least(classes - k, GROUP);
                switch (least(rows - r, TOGETHER)) {
                case 1:
                    AS_CONSTANT(ONE_DOTS, some)
                    break;
#if TOGETHER > 2
                case 2:
                    AS_CONSTANT(TWO_DOTS, some)
                    break;
                case 3:
                    AS_CONSTANT(THREE_DOTS, some)
                    break;
#endif
                default:
                    AS_CONSTANT(MOST_DOTS, some)
                }
            }
    }
}

/* Adds the outer products of `rows` examples, for some classes and `count` vectors of features. */
INLINE void add_strip(size_t rows, const int classes, const int count, const float *slopes, const float *inputs,
                      size_t width, float *gradient) {
    vector sum[GROUP][TOGETHER];
    for (int k = 0; k < classes; k++)
        for (int j = 0; j < count; j++)
            sum[k][j] = load(gradient + (size_t)k * width + j * LANES);
    for (size_t e = 0; e < rows; e++) {
        vector x[TOGETHER];
        for (int j = 0; j < count; j++) {
            x[j] = load(inputs + e * width + j * LANES);
            KEEP(x[j]);
        }
        for (int k = 0; k < classes; k++) {
            const vector slope = ALL(slopes[k * ROWS + e]);
            for (int j = 0; j < count; j++)
                sum[k][j] = MULTIPLY_ADD(x[j], slope, sum[k][j]);
        }
    }
    for (int k = 0; k < classes; k++)
        for (int j = 0; j < count; j++)
            store(gradient + (size_t)k * width + j * LANES, sum[k][j]);
}

/* The same for the last features, fewer than a vector holds. */
INLINE void add_rest(size_t rows, const int classes, const float *slopes, const float *inputs, size_t width,
                     size_t size, float *gradient) {
    vector sum[GROUP];
    for (int k = 0; k < classes; k++)
        sum[k] = load_some(gradient + (size_t)k * width, size);
    for (size_t e = 0; e < rows; e++) {
        const vector x = load_some(inputs + e * width, size);
        for (int k = 0; k < classes; k++)
            sum[k] = MULTIPLY_ADD(x, ALL(slopes[k * ROWS + e]), sum[k]);
    }
    for (int k = 0; k < classes; k++)
        memcpy(gradient + (size_t)k * width, &sum[k], size * sizeof *gradient);
}

/* gradient[class][feature] += slopes inputs; fetches `following` rows that come next. */
static void add_outer(size_t rows, size_t following, size_t classes, const float *slopes, const float *inputs, size_t width,
                      float *gradient) {
    const size_t whole = width / LANES;
    for (size_t v = 0; v < whole;) {
        const size_t count = whole - v < TOGETHER ? 1 : TOGETHER, i = v * LANES;
        for (size_t e = 0; e < following; e++)
            for (size_t j = 0; j < count * LANES; j += LINE)
                __builtin_prefetch(inputs + (rows + e) * width + i + j, 0, 2);
        for (size_t k = 0; k < classes; k += GROUP) {
#define STRIP(some, vectors)                                                                                           \
    add_strip(rows, some, vectors, slopes + k * ROWS, inputs + i, width, gradient + k * width + i)
#define WIDE_STRIP(some) STRIP(some, TOGETHER)
#define NARROW_STRIP(some) STRIP(some, 1)
            if (count == TOGETHER)
                AS_CONSTANT(WIDE_STRIP, least(classes - k, GROUP))
            else
                AS_CONSTANT(NARROW_STRIP, least(classes - k, GROUP))
        }
        v += count;
    }
    const size_t done = whole * LANES;
    for (size_t k = 0; done < width && k < classes; k += GROUP) {
#define REST(some)                                                                                                     \
    add_rest(rows, some, slopes + k * ROWS, inputs + done, width, width - done, gradient + k * width + done)
        AS_CONSTANT(REST, least(classes - k, GROUP))
    }
}

/* exp(x) for x <= 0, within two units in the last place; 0 below the normal numbers, and NaN for NaN. */
INLINE float exp_of(float x) {
    const float whole = (x * 0x1.715476p+0f + 0x1.8p23f) - 0x1.8p23f; /* x / ln 2, rounded */
    const float power = whole < -126.0f ? -126.0f : whole;
    const float rest = (x - power * 0x1.62e4p-1f) - power * 0x1.7f7d1cp-20f; /* ln 2 in two parts */
    float sum = 1.0f / 5040.0f;
    sum = sum * rest + 1.0f / 720.0f;
    sum = sum * rest + 1.0f / 120.0f;
    sum = sum * rest + 1.0f / 24.0f;
    sum = sum * rest + 1.0f / 6.0f;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    union {
        uint32_t bits;
        float number;
    } scale = {.bits = (uint32_t)((int32_t)(power > -126.0f ? power : -126.0f) + 127) << 23}; /* NaN: any scale */
    return x < -87.0f ? 0.0f : sum * scale.number;
}

/* Logits [class][row] become the derivatives of the weighted losses. */
static void slopes_of(size_t rows, size_t classes, const int64_t *labels, const float *weights,
                      float *restrict logits) {
    float most[ROWS], sum[ROWS], factor[ROWS] = {0.0f};
    for (size_t e = 0; e < ROWS; e++) {
        most[e] = logits[e];
        sum[e] = 0.0f;
    }
    memcpy(factor, weights, rows * sizeof *weights);
    for (size_t k = 1; k < classes; k++)
        for (size_t e = 0; e < ROWS; e++)
            most[e] = logits[k * ROWS + e] > most[e] ? logits[k * ROWS + e] : most[e];
    for (size_t k = 0; k < classes; k++)
        for (size_t e = 0; e < ROWS; e++) {
            logits[k * ROWS + e] = exp_of(logits[k * ROWS + e] - most[e]);
            sum[e] += logits[k * ROWS + e];
        }
    for (size_t k = 0; k < classes; k++)
        for (size_t e = 0; e < ROWS; e++)
            logits[k * ROWS + e] /= sum[e];
    for (size_t e = 0; e < rows; e++)
        logits[(size_t)labels[e] * ROWS + e] -= 1.0f;
    for (size_t k = 0; k < classes; k++)
        for (size_t e = 0; e < ROWS; e++)
            logits[k * ROWS + e] *= factor[e];
}

/* The gradient of one client, weights [classes, width] and then biases [classes]; `stored` examples follow in memory,
 * its own and those of later clients. */
static void client_gradient(const float *model, const float *inputs, const int64_t *labels, const float *weights,
                            size_t examples, size_t stored, size_t width, size_t classes, float *gradient) {
    float slopes[MAX_CLASSES * ROWS];
    const float *bias = model + classes * width;
    memset(gradient, 0, classes * (width + 1) * sizeof *gradient);
    while (examples > 0 && weights[examples - 1] == 0.0f) /* padding */
        examples--;
    for (size_t start = 0; start < examples; start += ROWS) {
        const size_t rows = least(examples - start, ROWS);
        for (size_t k = 0; k < classes; k++)
            for (size_t e = 0; e < ROWS; e++)
                slopes[k * ROWS + e] = bias[k];
        add_logits(rows, classes, inputs + start * width, model, width, slopes);
        slopes_of(rows, classes, labels + start, weights + start, slopes);
        add_outer(rows, least(stored - start - rows, ROWS), classes, slopes, inputs + start * width, width, gradient);
        for (size_t k = 0; k < classes; k++)
            for (size_t e = 0; e < rows; e++)
                gradient[classes * width + k] += slopes[k * ROWS + e];
    }
}

/* The gradients of `clients` at models with a stride of `stride`: 0 if all have the same. inputs [clients, examples,
 * width], labels and weights [clients, examples]. Returns 0 on success, and does nothing and returns 1 for too many
 * classes or a label that is not a class. */
int softmax_gradients(const float *models, size_t stride, const float *inputs, const int64_t *labels,
                      const float *weights, size_t clients, size_t examples, size_t width, size_t classes,
                      float *gradients) {
    if (classes < 1 || classes > MAX_CLASSES)
        return 1;
    for (size_t i = 0; i < clients * examples; i++)
        if (labels[i] < 0 || labels[i] >= (int64_t)classes)
            return 1;
    for (size_t c = 0; c < clients; c++) {
        const size_t first = c * examples;
        client_gradient(models + c * stride, inputs + first * width, labels + first, weights + first, examples,
                        clients * examples - first, width, classes, gradients + c * classes * (width + 1));
    }
    return 0;
}
