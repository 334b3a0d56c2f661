/* Fast form of numpy's SeedSequence (O'Neill 2015) and Philox4x64-10 (Salmon, Moraes, Dror, Shaw 2011).
 *
 * numpy's counter starts at 0 and is increased before each group of four words.
 */
#include <stddef.h>
#include <stdint.h>

#define POOL 4

static inline uint32_t hashed(uint32_t value, uint32_t *constant, uint32_t factor) {
    value ^= *constant;
    *constant *= factor;
    value *= *constant;
    return value ^ value >> 16;
}

static inline uint32_t mixed(uint32_t into, uint32_t value) {
    const uint32_t sum = 0xca01f9ddu * into - 0x4973f715u * value;
    return sum ^ sum >> 16;
}

/* Write a generator's key from at least four numbers of entropy. */
void philox_key(const uint32_t *entropy, size_t size, uint64_t key[2]) {
    uint32_t pool[POOL], constant = 0x43b0d7e5u, state[4];
    for (size_t i = 0; i < POOL; i++)
        pool[i] = hashed(entropy[i], &constant, 0x931e8875u);
    for (size_t from = 0; from < POOL; from++)
        for (size_t to = 0; to < POOL; to++)
            if (from != to)
                pool[to] = mixed(pool[to], hashed(pool[from], &constant, 0x931e8875u));
    for (size_t from = POOL; from < size; from++)
        for (size_t to = 0; to < POOL; to++)
            pool[to] = mixed(pool[to], hashed(entropy[from], &constant, 0x931e8875u));
    constant = 0x8b51f9ddu;
    for (size_t i = 0; i < 4; i++)
        state[i] = hashed(pool[i], &constant, 0x58f38dedu);
    key[0] = state[0] | (uint64_t)state[1] << 32;
    key[1] = state[2] | (uint64_t)state[3] << 32;
}

static inline uint64_t product(uint64_t a, uint64_t b, uint64_t *low) {
    const unsigned __int128 whole = (unsigned __int128)a * b;
    *low = (uint64_t)whole;
    return (uint64_t)(whole >> 64);
}

static inline void four_words(uint64_t key0, uint64_t key1, uint64_t counter, uint64_t *words) {
    uint64_t w0 = counter, w1 = 0, w2 = 0, w3 = 0;
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
        uint64_t low0, low1;
        const uint64_t high0 = product(0xD2E7470EE14C6C93u, w0, &low0);
        const uint64_t high1 = product(0xCA5A826395121157u, w2, &low1);
        w0 = high1 ^ w1 ^ key0;
        w2 = high0 ^ w3 ^ key1;
        w1 = low1;
        w3 = low0;
        key0 += 0x9E3779B97F4A7C15u;
        key1 += 0xBB67AE8584CAA73Bu;
    }
    words[0] = w0;
    words[1] = w1;
    words[2] = w2;
    words[3] = w3;
}

/* Write `size` words of the generator with this key, from number `position` on. */
void philox_words(uint64_t key0, uint64_t key1, uint64_t position, size_t size, uint64_t *restrict words) {
    uint64_t some[4], counter = position / 4 + 1;
    size_t done = 0;
    if (position % 4) {
        four_words(key0, key1, counter++, some);
        for (size_t i = position % 4; i < 4 && done < size; i++)
            words[done++] = some[i];
    }
    for (; size - done >= 4; done += 4)
        four_words(key0, key1, counter++, words + done);
    if (done < size) {
        four_words(key0, key1, counter, some);
        for (size_t i = 0; done < size; i++)
            words[done++] = some[i];
    }
}
