/* Convolutions of SIDE x SIDE with stride 1 that keep the size of images, and their gradients, for few channels.
 *
 * General libraries lay channels out in blocks of sixteen, which a small network does not fill. Here a vector holds
 * neighbors in a row of one channel; it is multiplied for OUTS channels of outputs at once, with their sums in registers.
 * Images are first copied into frames of zeros, so that no loop tests for a border.
 */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define OUTS 8      /* channels of outputs at once */
#define GRADIENTS 4 /* of the gradient by the weights */
#define ALL(x) ((vector)_mm512_set1_ps(x))
#define MULTIPLY_ADD(a, b, c) ((vector)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define KEEP(v) __asm__("" : "+v"(v))
#elif defined(__AVX__) && defined(__FMA__)
#include <immintrin.h>
#define LANES 8
#define OUTS 4
#define GRADIENTS 2
#define ALL(x) ((vector)_mm256_set1_ps(x))
#define MULTIPLY_ADD(a, b, c) ((vector)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define KEEP(v) __asm__("" : "+x"(v))
#else
#error "measured with AVX and FMA alone; torch computes convolutions elsewhere"
#endif
#define INLINE static inline __attribute__((always_inline))

#define SIDE 5
#define MARGIN (SIDE / 2)
#define TAPS (SIDE * SIDE)
#define PAIR 2
#define VECTORS 64 /* of a channel: as many images are added before their sums leave the registers */

typedef float vector __attribute__((vector_size(4 * LANES)));

INLINE vector load(const float *at) {
    vector v;
    memcpy(&v, at, sizeof v);
    return v;
}

INLINE void store(float *at, vector v) { memcpy(at, &v, sizeof v); }

INLINE float total(vector v) {
    float lanes[LANES];
    store(lanes, v);
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            lanes[i] += lanes[i + n];
    return lanes[0];
}

/* Images in frames of zeros: the margin right of a row is also the one left of the next. */
typedef struct {
    size_t height, width, across; /* of an image; vectors in a row */
    size_t pitch, channel;        /* floats from row to row, from channel to channel */
} frame;

static frame frame_of(size_t height, size_t width) {
    frame f = {.height = height, .width = width, .across = (width + LANES - 1) / LANES};
    const size_t least = f.across * LANES; /* so that zeros fill the last vector of a row of slopes */
    f.pitch = width + 2 * MARGIN > least ? width + 2 * MARGIN : least;
    f.channel = (height + 2 * MARGIN) * f.pitch;
    return f;
}

/* Room for framed channels; LANES more floats, which the last vector of the last row may read. */
static float *framed_room(frame f, size_t channels) {
    return calloc(channels * f.channel + LANES + MARGIN, sizeof(float));
}

/* Strides of images in floats. */
typedef struct {
    size_t image, channel, row, place;
} strides;

static void put_in_frame(const float *from, strides s, size_t channels, frame f, float *to) {
    for (size_t c = 0; c < channels; c++)
        for (size_t y = 0; y < f.height; y++) {
            const float *row = from + c * s.channel + y * s.row;
            float *at = to + c * f.channel + (y + MARGIN) * f.pitch + MARGIN;
            if (s.place == 1)
                memcpy(at, row, f.width * sizeof *at);
            else
                for (size_t x = 0; x < f.width; x++)
                    at[x] = row[x * s.place];
        }
}

/* Weights [outs, channels, TAPS], or those of the transposed convolution, as [block of OUTS][channel][tap][OUTS]. */
static float *packed_weights(const float *weight, size_t outs, size_t channels, int transposed) {
    const size_t blocks = (outs + OUTS - 1) / OUTS;
    float *packed = calloc(blocks * channels * TAPS * OUTS + 1, sizeof *packed);
    for (size_t o = 0; packed != NULL && o < outs; o++)
        for (size_t c = 0; c < channels; c++)
            for (size_t t = 0; t < TAPS; t++)
                packed[((o / OUTS * channels + c) * TAPS + t) * OUTS + o % OUTS] =
                    transposed ? weight[(c * outs + o) * TAPS + TAPS - 1 - t] : weight[(o * channels + c) * TAPS + t];
    return packed;
}

/* `count` vectors of OUTS channels of outputs. */
INLINE void convolve_vectors(const int count, const float *const *inputs, size_t channels, frame f, const float *packed,
                             const float *bias, vector sum[OUTS][PAIR]) {
    for (int o = 0; o < OUTS; o++)
        for (int j = 0; j < count; j++)
            sum[o][j] = ALL(bias[o]);
    for (size_t c = 0; c < channels; c++)
        for (size_t ky = 0; ky < SIDE; ky++) {
            const size_t row = c * f.channel + ky * f.pitch;
            for (size_t kx = 0; kx < SIDE; kx++, packed += OUTS) {
                vector x[PAIR];
                for (int j = 0; j < count; j++) {
                    x[j] = load(inputs[j] + row + kx);
                    KEEP(x[j]);
                }
                for (int o = 0; o < OUTS; o++) {
                    const vector w = ALL(packed[o]);
                    for (int j = 0; j < count; j++)
                        sum[o][j] = MULTIPLY_ADD(x[j], w, sum[o][j]);
                }
            }
        }
}

/* One image: outputs [outs, height, width] from framed inputs. */
static void convolve(const float *inputs, size_t channels, frame f, const float *packed, const float *bias, size_t outs,
                     float *outputs) {
    const size_t places = f.height * f.width, vectors = f.height * f.across;
    for (size_t o = 0; o < outs; o += OUTS, packed += channels * TAPS * OUTS) {
        float biases[OUTS] = {0.0f};
        const size_t some = outs - o < OUTS ? outs - o : OUTS;
        if (bias != NULL)
            memcpy(biases, bias + o, some * sizeof *bias);
        for (size_t v = 0; v < vectors; v += PAIR) {
            const size_t count = vectors - v < PAIR ? vectors - v : PAIR;
            const float *at[PAIR];
            float *to[PAIR];
            size_t size[PAIR];
            for (size_t j = 0; j < count; j++) {
                const size_t y = (v + j) / f.across, x = (v + j) % f.across * LANES;
                at[j] = inputs + y * f.pitch + x;
                to[j] = outputs + o * places + y * f.width + x;
                size[j] = f.width - x < LANES ? f.width - x : LANES;
            }
            vector sum[OUTS][PAIR];
            if (count == PAIR)
                convolve_vectors(PAIR, at, channels, f, packed, biases, sum);
            else
                convolve_vectors(1, at, channels, f, packed, biases, sum);
            for (size_t k = 0; k < some; k++)
                for (size_t j = 0; j < count; j++) {
                    if (size[j] == LANES)
                        store(to[j] + k * places, sum[k][j]);
                    else
                        memcpy(to[j] + k * places, &sum[k][j], size[j] * sizeof(float));
                }
        }
    }
}

/* outputs [images, outs, height, width] of inputs with these strides; weight [outs, channels, SIDE, SIDE], or with
 * `transposed`, which gives the gradient by the inputs, [channels, outs, SIDE, SIDE]. bias [outs], or NULL.
 * Returns 0, or 1 without memory. */
int convolution(const float *inputs, size_t images, size_t channels, size_t height, size_t width, size_t image_stride,
                size_t channel_stride, size_t row_stride, size_t place_stride, const float *weight, const float *bias,
                size_t outs, int transposed, float *outputs) {
    const frame f = frame_of(height, width);
    const strides s = {image_stride, channel_stride, row_stride, place_stride};
    float *framed = framed_room(f, channels), *packed = packed_weights(weight, outs, channels, transposed);
    const int missing = framed == NULL || packed == NULL;
    for (size_t n = 0; !missing && n < images; n++) {
        put_in_frame(inputs + n * s.image, s, channels, f, framed);
        convolve(framed, channels, f, packed, bias, outs, outputs + n * outs * height * width);
    }
    free(framed);
    free(packed);
    return missing;
}

/* Adds the products of a row of taps for some channels of outputs: sum [outs][SIDE], one vector for each. */
INLINE void add_products(const int outs, const float *inputs, const float *slopes, size_t images, size_t inputs_image,
                         size_t slopes_image, frame f, vector *kept, size_t stride) {
    vector sum[GRADIENTS][SIDE];
    for (int o = 0; o < outs; o++)
        for (int k = 0; k < SIDE; k++)
            sum[o][k] = kept[o * stride + k];
    for (size_t n = 0; n < images; n++)
        for (size_t y = 0; y < f.height; y++)
            for (size_t v = 0; v < f.across; v++) {
                const float *x = inputs + n * inputs_image + y * f.pitch + v * LANES;
                const float *d = slopes + n * slopes_image + y * f.pitch + v * LANES;
                vector slope[GRADIENTS];
                for (int o = 0; o < outs; o++) {
                    slope[o] = load(d + o * f.channel);
                    KEEP(slope[o]);
                }
                for (int k = 0; k < SIDE; k++) {
                    vector input = load(x + k);
                    KEEP(input);
                    for (int o = 0; o < outs; o++)
                        sum[o][k] = MULTIPLY_ADD(input, slope[o], sum[o][k]);
                }
            }
    for (int o = 0; o < outs; o++)
        for (int k = 0; k < SIDE; k++)
            kept[o * stride + k] = sum[o][k];
}

/* Adds the products of some images to sums [outs][channels][TAPS], one vector for each. */
static void add_images(const float *inputs, const float *slopes, size_t images, size_t channels, size_t outs, frame f,
                       vector *sums) {
    const size_t inputs_image = channels * f.channel, slopes_image = outs * f.channel, stride = channels * TAPS;
    const float *first = slopes + MARGIN * f.pitch + MARGIN;
    size_t o = 0;
    for (; o + GRADIENTS <= outs; o += GRADIENTS)
        for (size_t t = 0; t < channels * SIDE; t++)
            add_products(GRADIENTS, inputs + t / SIDE * f.channel + t % SIDE * f.pitch, first + o * f.channel, images,
                         inputs_image, slopes_image, f, sums + o * stride + t * SIDE, stride);
    for (; o < outs; o++)
        for (size_t t = 0; t < channels * SIDE; t++)
            add_products(1, inputs + t / SIDE * f.channel + t % SIDE * f.pitch, first + o * f.channel, images,
                         inputs_image, slopes_image, f, sums + o * stride + t * SIDE, stride);
}

/* The gradients by weights [outs, channels, SIDE, SIDE] and, unless NULL, biases [outs], from slopes [images, outs,
 * height, width] without gaps. Returns 0, or 1 without memory. */
int convolution_gradient(const float *inputs, size_t images, size_t channels, size_t height, size_t width,
                         size_t image_stride, size_t channel_stride, size_t row_stride, size_t place_stride,
                         const float *slopes, size_t outs, float *weight, float *bias) {
    const frame f = frame_of(height, width);
    const strides s = {image_stride, channel_stride, row_stride, place_stride};
    const strides dense = {outs * height * width, height * width, width, 1};
    const size_t vectors = height * f.across, together = vectors > 0 && vectors < VECTORS ? VECTORS / vectors : 1;
    const size_t count = outs * channels * TAPS;
    float *x = framed_room(f, together * channels), *d = framed_room(f, together * outs);
    vector *sums = aligned_alloc(sizeof *sums, (count + 1) * sizeof *sums);
    const int missing = x == NULL || d == NULL || sums == NULL;
    if (!missing)
        memset(sums, 0, count * sizeof *sums);
    for (size_t n = 0; !missing && n < images; n += together) {
        const size_t some = images - n < together ? images - n : together;
        for (size_t i = 0; i < some; i++) {
            put_in_frame(inputs + (n + i) * s.image, s, channels, f, x + i * channels * f.channel);
            put_in_frame(slopes + (n + i) * dense.image, dense, outs, f, d + i * outs * f.channel);
        }
        add_images(x, d, some, channels, outs, f, sums);
    }
    for (size_t i = 0; !missing && i < count; i++)
        weight[i] = total(sums[i]);
    for (size_t o = 0; !missing && bias != NULL && o < outs; o++) {
        float sum[LANES] = {0.0f};
        for (size_t n = 0; n < images; n++)
            for (size_t i = 0; i < height * width; i++)
                sum[i % LANES] += slopes[n * dense.image + o * dense.channel + i];
        vector v = load(sum);
        bias[o] = total(v);
    }
    free(x);
    free(d);
    free(sums);
    return missing;
}
