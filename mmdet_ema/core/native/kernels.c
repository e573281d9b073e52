/* The update of float32 averages in host memory, in one reading of them.
 *
 * A step that holds NaN or Inf must leave every average as it was, bit for
 * bit, but whether it does is known only when all weights have been read. So
 * what is written is made sure to be revocable: beside each new average,
 * `earlier` works out the old one from it. Almost always it gets the same
 * bits; a line in which it does not is kept in a log. To take a step back is
 * to go through `earlier`, and to put back what the log holds.
 *
 * Where the weight of the new value is large, most lines would go to the log:
 * there, and where a log is full, the weights are read once more instead.
 *
 * No memory is allocated here, and no header of Python or torch is needed.
 */

#include <fenv.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* In elements; AHEAD in tensors. A log has room for one block at least. */
enum { LINE = 16, BLOCK = 4 * LINE, FORESEEN = 128, AHEAD = 4 };

/* Above it more than a few lines in a hundred would go to the log. */
static const float REVOCABLE = 1.0f / 512;

/* A line as it was. */
typedef struct {
  float *where;
  int64_t count;
  float old[LINE];
} Kept;

/* A run of elements, all tensors laid end to end: what a thread takes. */
typedef struct {
  int64_t begin, end, done;
  Kept *log;
  int64_t kept;
} Part;

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

/* What the raw values of a tensor are; averages are float32. */
typedef enum { FLOAT32, BFLOAT16, FLOAT16 } Kind;

/* Made once for many updates; see update.py. */
typedef struct {
  float *const *averages;
  const void *const *raws;
  const int64_t *kinds;
  const int64_t *starts; /* of each tensor, and the end of the last */
  int64_t num_tensors;
  Part *parts;
  int64_t num_parts;
  int64_t room; /* of each log, in lines */
} Plan;

typedef enum { WRITE_REVOCABLY, INSPECT, WRITE, REVOKE } Phase;

typedef struct {
  const Plan *plan;
  Phase phase;
  float weight;  /* of the raw values */
  int64_t taken; /* parts that a thread has taken */
  int nonfinite; /* whether NaN or Inf was met */
} Job;

typedef union {
  float value;
  uint32_t bits;
} Word;

INLINE const void *from(const void *raw, int64_t first, Kind kind) {
  return (const char *)raw + first * (kind == FLOAT32 ? 4 : 2);
}

/* As integers: compilers know no vectors of the short kinds. */
INLINE float from_float16(uint32_t bits) {
  Word small = {.bits = (bits & 0x7fffu) << 13}; /* 2**112 times too small */
  Word whole = {.value = small.value * 0x1p112f};
  uint32_t endless = small.bits >= 0x0f800000u ? 0x7f800000u : 0;
  whole.bits |= endless | (bits & 0x8000u) << 16;
  return whole.value;
}

/* Every value of the short kinds is one of float32. */
INLINE float value(const void *raw, int64_t i, Kind kind) {
  if (kind == FLOAT32) return ((const float *)raw)[i];
  uint32_t bits = ((const uint16_t *)raw)[i];
  if (kind == FLOAT16) return from_float16(bits);
  Word word = {.bits = bits << 16};
  return word.value;
}

/* One rounding of the difference, one of the rest: as torch's lerp. */
INLINE float later(float average, float raw, float weight) {
  return __builtin_fmaf(weight, raw - average, average);
}

INLINE float earlier(float average, float raw, float weight) {
  return __builtin_fmaf(-weight / (1.0f - weight), raw - average, average);
}

/* From the raw value, where that weighs more. */
INLINE float mostly_raw(float average, float raw, float weight) {
  return __builtin_fmaf(weight - 1.0f, raw - average, raw);
}

INLINE int are_finite(const void *raw, int64_t count, Kind kind) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; i++) {
    Word word = {.value = value(raw, i, kind)};
    uint32_t exponent = word.bits & 0x7f800000u;
    largest = exponent > largest ? exponent : largest;
  }
  return largest < 0x7f800000u;
}

/* Return 0 if an old average follows from the new one, in all its bits.
 * From NaN or Inf nothing follows: they lead to NaN, which equals nothing. */
INLINE uint32_t is_lost(float old, float new, float raw, float weight) {
  Word before = {.value = old}, back = {.value = earlier(new, raw, weight)};
  return (back.bits ^ before.bits) | (back.value != back.value);
}

/* Work out new averages; return 0 if the old ones follow from them. */
INLINE uint32_t renew(float *restrict new, const float *restrict average,
                      const void *restrict raw, float weight, int64_t count,
                      Kind kind) {
  uint32_t differing = 0;
  for (int64_t i = 0; i < count; i++) {
    float target = value(raw, i, kind);
    new[i] = later(average[i], target, weight);
    differing |= is_lost(average[i], new[i], target, weight);
  }
  return differing;
}

INLINE int any_lost(const float *new, const float *average, const void *raw,
                    float weight, int64_t count, Kind kind) {
  uint32_t differing = 0;
  for (int64_t i = 0; i < count; i++)
    differing |= is_lost(average[i], new[i], value(raw, i, kind), weight);
  return differing != 0;
}

/* Keep the lines of a block from which no way leads back.
 * Return 0 if it holds NaN or Inf, or the log is full. */
INLINE int keep(Job *job, Part *part, const float *new, float *average,
                const void *raw, int64_t count, Kind kind) {
  if (!are_finite(raw, count, kind)) {
    __atomic_store_n(&job->nonfinite, 1, __ATOMIC_RELAXED);
    return 0;
  }
  if (part->kept + BLOCK / LINE > job->plan->room) return 0;
  for (int64_t i = 0; i < count; i += LINE) {
    int64_t length = count - i < LINE ? count - i : LINE;
    Kept *kept = &part->log[part->kept];
    kept->where = average + i;
    kept->count = length;
    memcpy(kept->old, average + i, length * sizeof(float));
    /* No branch: which line it is cannot be foreseen. */
    part->kept += any_lost(new + i, average + i, from(raw, i, kind),
                           job->weight, length, kind);
  }
  return 1;
}

/* Write up to a block; return 0 if it cannot be written. */
INLINE int write_block(Job *job, Part *part, float *average, const void *raw,
                       int64_t count, Kind kind) {
  float new[BLOCK];
  if (renew(new, average, raw, job->weight, count, kind) &&
      !keep(job, part, new, average, raw, count, kind))
    return 0;
  memcpy(average, new, count * sizeof(float));
  return 1;
}

/* Return how many elements were written before it had to stop. */
INLINE int64_t write_revocably(Job *job, Part *part, float *average,
                               const void *raw, int64_t count, Kind kind) {
  int64_t i = 0;
  for (; i + BLOCK <= count; i += BLOCK)
    if (!write_block(job, part, average + i, from(raw, i, kind), BLOCK, kind))
      return i;
  if (i < count && !write_block(job, part, average + i, from(raw, i, kind),
                                count - i, kind))
    return i;
  return count;
}

INLINE int64_t inspect(Job *job, const void *raw, int64_t count, Kind kind) {
  if (!are_finite(raw, count, kind))
    __atomic_store_n(&job->nonfinite, 1, __ATOMIC_RELAXED);
  return count;
}

INLINE int64_t write_all(float *restrict average, const void *restrict raw,
                         float weight, int64_t count, Kind kind) {
  if (weight < 0.5f)
    for (int64_t i = 0; i < count; i++)
      average[i] = later(average[i], value(raw, i, kind), weight);
  else if (weight == 1.0f) /* a copy, also where the difference overflows */
    for (int64_t i = 0; i < count; i++) average[i] = value(raw, i, kind);
  else
    for (int64_t i = 0; i < count; i++)
      average[i] = mostly_raw(average[i], value(raw, i, kind), weight);
  return count;
}

INLINE int64_t take_back(float *restrict average, const void *restrict raw,
                         float weight, int64_t count, Kind kind) {
  for (int64_t i = 0; i < count; i++)
    average[i] = earlier(average[i], value(raw, i, kind), weight);
  return count;
}

INLINE int64_t advance(Job *job, Part *part, float *average, const void *raw,
                       int64_t count, Kind kind) {
  switch (job->phase) {
  case WRITE_REVOCABLY:
    return write_revocably(job, part, average, raw, count, kind);
  case INSPECT:
    return inspect(job, raw, count, kind);
  case WRITE:
    return write_all(average, raw, job->weight, count, kind);
  default:
    return take_back(average, raw, job->weight, count, kind);
  }
}

/* The same, compiled for each kind. */
INLINE int64_t advance_in(Job *job, Part *part, int64_t tensor, int64_t first,
                          int64_t count) {
  float *average = job->plan->averages[tensor] + first;
  const void *raw = job->plan->raws[tensor];
  switch (job->plan->kinds[tensor]) {
  case FLOAT32:
    return advance(job, part, average, from(raw, first, FLOAT32), count,
                   FLOAT32);
  case BFLOAT16:
    return advance(job, part, average, from(raw, first, BFLOAT16), count,
                   BFLOAT16);
  default:
    return advance(job, part, average, from(raw, first, FLOAT16), count,
                   FLOAT16);
  }
}

/* Return the tensor that an element belongs to. */
static int64_t tensor_of(const Plan *plan, int64_t element) {
  int64_t low = 0, high = plan->num_tensors;
  while (high - low > 1) {
    int64_t middle = low + (high - low) / 2;
    if (plan->starts[middle] <= element)
      low = middle;
    else
      high = middle;
  }
  return low;
}

/* Fetch the beginning of a tensor that is soon to come: on short ones the
 * processor's own foresight starts too late. */
INLINE void foresee(const Plan *plan, int64_t tensor) {
  if (tensor >= plan->num_tensors) return;
  const float *average = plan->averages[tensor];
  const void *raw = plan->raws[tensor];
  Kind kind = plan->kinds[tensor];
  int64_t count = plan->starts[tensor + 1] - plan->starts[tensor];
  for (int64_t i = 0; i < count && i < FORESEEN; i += LINE) {
    __builtin_prefetch(average + i, 1);
    __builtin_prefetch(from(raw, i, kind), 0);
  }
}

/* Go through elements until something stops it; return where it stopped. */
INLINE int64_t walk(Job *job, Part *part, int64_t at, int64_t end) {
  const Plan *plan = job->plan;
  int64_t tensor = at < end ? tensor_of(plan, at) : 0;
  for (; at < end; tensor++) {
    int64_t offset = at - plan->starts[tensor];
    int64_t stop = plan->starts[tensor + 1];
    foresee(plan, tensor + AHEAD);
    int64_t count = (stop < end ? stop : end) - at;
    int64_t passed = advance_in(job, part, tensor, offset, count);
    at += passed;
    if (passed < count) break;
    if (job->phase <= INSPECT &&
        __atomic_load_n(&job->nonfinite, __ATOMIC_RELAXED))
      break;
  }
  return at;
}

INLINE void run_part(Job *job, Part *part) {
  switch (job->phase) {
  case INSPECT:
    walk(job, part, part->done, part->end);
    break;
  case REVOKE:
    walk(job, part, part->begin, part->done);
    for (int64_t i = 0; i < part->kept; i++) {
      Kept *kept = &part->log[i];
      memcpy(kept->where, kept->old, kept->count * sizeof(float));
    }
    break;
  default:
    part->done = walk(job, part, part->done, part->end);
  }
}

typedef void (*RunPart)(Job *, Part *);

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void
run_part_avx2(Job *job, Part *part) {
  run_part(job, part);
}
static RunPart fitting(void) {
  __builtin_cpu_init();
  /* Wider vectors gain nothing: memory is the limit. */
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
             ? run_part_avx2
             : 0; /* without a fused multiply-add it is slow */
}
#elif defined(__aarch64__)
static void run_part_neon(Job *job, Part *part) { run_part(job, part); }
static RunPart fitting(void) { return run_part_neon; }
#else
static RunPart fitting(void) { return 0; }
#endif

static void work(void *argument) {
  Job *job = argument;
  int64_t parts = job->plan->num_parts, i;
  RunPart run = fitting();
  fenv_t environment;
  /* Rounding and subnormal numbers as by default: in each thread, so that
   * one can take back what another wrote. */
  fegetenv(&environment);
  fesetenv(FE_DFL_ENV);
  while ((i = __atomic_fetch_add(&job->taken, 1, __ATOMIC_RELAXED)) < parts)
    /* The last is written first: it was read last, and may be in the cache. */
    run(job, &job->plan->parts[job->phase == WRITE ? parts - 1 - i : i]);
  fesetenv(&environment);
}

static void run(Job *job, Phase phase, Parallel parallel, unsigned threads) {
  job->phase = phase;
  job->taken = 0;
  if (parallel && threads > 1)
    parallel(work, job, threads, 0);
  else
    work(job);
}

static int is_done(const Plan *plan) {
  for (int64_t i = 0; i < plan->num_parts; i++)
    if (plan->parts[i].done < plan->parts[i].end) return 0;
  return 1;
}

/* Return 0 where the processor cannot be served, else the number of this
 * interface, to be raised with every change, and the sizes of all structs;
 * interface.py has the same. */
int mmdet_ema_interface(void) {
  if (!fitting()) return 0;
  return 4 << 24 | (int)(sizeof(Plan) << 16 | sizeof(Part) << 8 | sizeof(Kept));
}

/* Return 1, or 0 if nothing was changed because of NaN or Inf.
 * `parallel` is GOMP_parallel or null. */
int mmdet_ema_update(const Plan *plan, float weight, int gated,
                     Parallel parallel, unsigned threads) {
  Job job = {.plan = plan, .weight = weight};
  for (int64_t i = 0; i < plan->num_parts; i++) {
    plan->parts[i].done = plan->parts[i].begin;
    plan->parts[i].kept = 0;
  }
  if (gated && weight <= REVOCABLE)
    run(&job, WRITE_REVOCABLY, parallel, threads);
  if (gated && !job.nonfinite && !is_done(plan))
    run(&job, INSPECT, parallel, threads);
  if (job.nonfinite) {
    run(&job, REVOKE, parallel, threads);
    return 0;
  }
  if (!is_done(plan)) run(&job, WRITE, parallel, threads);
  return 1;
}
