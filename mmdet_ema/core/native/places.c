/* Whether tensors still lie where and how they lay.
 *
 * Torch is asked through DLPack's table of functions for C (DLPackExchangeAPI
 * of dlpack.h, https://github.com/dmlc/dlpack, version 1.3, Apache-2.0): no
 * number or tuple of Python is made for the hundreds of tensors of a model.
 * The functions here are to be called with the GIL held.
 *
 * After a forward and a backward pass most of what torch looks at is in no
 * cache any more, and each tensor costs a few accesses to memory, one after
 * the other. So they are fetched ahead, by addresses that may be out of date:
 * a fetch of a wrong one does no harm.
 */
#include <stdint.h>

/* AHEAD in tensors, the others in bytes. */
enum { MOST_DIMS = 5, AHEAD = 8, CACHE_LINE = 64, IMPL = 256, STORAGE = 128 };

/* DLTensor */
typedef struct {
  void *data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *strides; /* in elements */
  uint64_t byte_offset;
} View;

/* DLPackExchangeAPI, up to what is used of it. */
typedef struct {
  uint32_t major, minor;
  const void *older;
  const void *other_functions[3];
  int (*look)(void *object, View *view); /* 0, or -1 and Python's error */
} Exchange;

/* What a tensor looked like when it was noted. */
typedef struct {
  void *object;               /* as Python knows it; it has to be alive */
  const char *impl, *storage; /* as torch knows them, or null: only hints */
  View view;
  int64_t shape[MOST_DIMS], strides[MOST_DIMS];
} Place;

static void fetch(const char *address, int bytes) {
  for (int i = 0; address && i < bytes; i += CACHE_LINE)
    __builtin_prefetch(address + i);
}

static int are_same(const int64_t *one, const int64_t *other, int count) {
  for (int i = 0; i < count; i++)
    if (one[i] != other[i]) return 0;
  return 1;
}

static int is_same(const Place *place, const View *view) {
  const View *seen = &place->view;
  return view->data == seen->data && view->byte_offset == seen->byte_offset &&
         view->device_type == seen->device_type && view->ndim == seen->ndim &&
         view->code == seen->code && view->bits == seen->bits &&
         are_same(view->shape, place->shape, view->ndim) &&
         are_same(view->strides, place->strides, view->ndim);
}

/* Return whether torch's table is one that is understood here. */
int mmdet_ema_understands(const Exchange *exchange) {
  return exchange->major == 1 && exchange->look != 0;
}

int64_t mmdet_ema_bytes_of_place(void) { return sizeof(Place); }

/* Note where tensors lie, given object, impl and storage of each.
 * Return 0 if one has too many dimensions, or torch cannot tell. */
int mmdet_ema_note(const Exchange *exchange, char *const (*tensors)[3],
                   int64_t count, Place *places) {
  for (int64_t i = 0; i < count; i++) {
    Place *place = &places[i];
    View *view = &place->view;
    place->object = tensors[i][0];
    place->impl = tensors[i][1];
    place->storage = tensors[i][2];
    if (exchange->look(place->object, view) || view->ndim > MOST_DIMS) return 0;
    for (int axis = 0; axis < view->ndim; axis++) {
      place->shape[axis] = view->shape[axis];
      place->strides[axis] = view->strides[axis];
    }
  }
  return 1;
}

/* Return whether all tensors look as they were noted; 0 with Python's error
 * set if torch cannot tell. */
int mmdet_ema_are_right(const Exchange *exchange, const Place *places,
                        int64_t count) {
  for (int64_t i = -AHEAD; i < count; i++) {
    View view;
    if (i + AHEAD < count) {
      const Place *next = &places[i + AHEAD];
      fetch(next->object, CACHE_LINE);
      fetch(next->impl, IMPL);
      fetch(next->storage, STORAGE);
    }
    if (i < 0) continue;
    if (exchange->look(places[i].object, &view)) return 0;
    if (!is_same(&places[i], &view)) return 0;
  }
  return 1;
}
