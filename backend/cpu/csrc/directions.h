// Sequences of a scan: as they lie in memory, or the four directions of an image.
//
// Direction 0 reads the rows, 1 the columns, 2 and 3 the same from the end. Only columns need
// another order in memory: transposed copies of them are made once per call, here. Reading from the
// end is a matter of indices, see Order.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>

#include "simd.h"

namespace qmir {

constexpr int kDirections = 4;

typedef uint8_t bytes16 __attribute__((vector_size(16)));

// The 16 x 16 square at src transposed to dst, up to rows x cols of it.
inline void transpose_square(const uint8_t* src, int64_t src_stride, uint8_t* dst,
                             int64_t dst_stride, int rows, int cols) {
  constexpr bytes16 low{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr bytes16 high{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  bytes16 r[16] = {}, t[16];
  for (int i = 0; i < rows; ++i) std::memcpy(&r[i], src + i * src_stride, cols);
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = __builtin_shuffle(r[i], r[i + 8], low);
      t[2 * i + 1] = __builtin_shuffle(r[i], r[i + 8], high);
    }
    std::memcpy(r, t, sizeof t);
  }
  for (int j = 0; j < cols; ++j) std::memcpy(dst + j * dst_stride, &r[j], rows);
}

inline void transpose_square(const float* src, int64_t src_stride, float* dst, int64_t dst_stride,
                             int rows, int cols) {
  lanes tile[kLanes];
  load_tile(src, src_stride, rows, cols, tile);
  for (int j = 0; j < cols; ++j) std::memcpy(dst + j * dst_stride, &tile[j], rows * sizeof(float));
}

template <class T>
void transpose_plane(const T* src, T* dst, int64_t height, int64_t width) {
  constexpr int kSide = sizeof(T) == 1 ? (int)sizeof(bytes16) : kLanes;
  for (int64_t h = 0; h < height; h += kSide)
    for (int64_t w = 0; w < width; w += kSide)
      transpose_square(src + h * width + w, width, dst + w * height + h, height,
                       (int)std::min<int64_t>(kSide, height - h),
                       (int)std::min<int64_t>(kSide, width - w));
}

// A tensor of (sample, group, row, step). The odd groups of images may lie in another tensor of the
// same strides, where their steps go by columns.
template <class T>
struct Planes {
  T* rows;
  T* columns;  // null: plain sequences
  int64_t sample_stride, group_stride;

  T* at(int64_t sample, int64_t group) const {
    T* base = columns && group % 2 ? columns : rows;
    return base + sample * sample_stride + group * group_stride;
  }
};

// In which order a group goes through its steps.
struct Order {
  int64_t length;
  bool image;

  bool back(int64_t group) const { return image && group >= 2; }

  // First place in memory of the `steps` steps from `start` on.
  int64_t at(int64_t group, int64_t start, int64_t steps) const {
    return back(group) ? length - start - steps : start;
  }
};

// Memory for the columns of a tensor, left uninitialised.
template <class T>
std::unique_ptr<T[]> scratch(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

// Column order of the odd directions of an image tensor (batch, groups, rows, height, width), with
// groups 1 (shared by all directions) or 4. With height and width swapped it is its own inverse.
template <class T>
void transpose_columns(const T* src, T* dst, int64_t batch, int64_t groups, int64_t rows,
                       int64_t height, int64_t width) {
  const int64_t length = height * width, used = groups == 1 ? 1 : 2;
#pragma omp parallel for collapse(3) schedule(static)
  for (int64_t sample = 0; sample < batch; ++sample)
    for (int64_t k = 0; k < used; ++k)
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t group = groups == 1 ? 0 : 2 * k + 1;
        const int64_t at = ((sample * groups + group) * rows + row) * length;
        transpose_plane(src + at, dst + at, height, width);
      }
}

// out = (rows + rows back) + (columns + columns back), images of the four directions
// (batch, 4, rows, length) of which the odd ones are in column order.
inline void merge_directions(const float* part, float* out, int64_t batch, int64_t rows,
                             int64_t height, int64_t width) {
  const int64_t length = height * width, step = rows * length;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t sample = 0; sample < batch; ++sample)
    for (int64_t row = 0; row < rows; ++row) {
      const float* p = part + sample * kDirections * step + row * length;
      float* y = out + (sample * rows + row) * length;
      for (int64_t w = 0; w < width; w += kLanes)
        for (int64_t h = 0; h < height; h += kLanes) {
          const int high = (int)std::min<int64_t>(kLanes, height - h);
          const int wide = (int)std::min<int64_t>(kLanes, width - w);
          lanes onward[kLanes], back[kLanes];
          const int64_t at = w * height + h;
          // Rows of these tiles are columns of the image.
          load_tile(p + step + at, height, wide, high, onward);
          load_tile(p + 3 * step + at, height, wide, high, back);
          for (int i = 0; i < high; ++i) {
            const int64_t to = (h + i) * width + w;
            float sums[kLanes];
            store(sums, onward[i] + back[i]);
            for (int j = 0; j < wide; ++j)
              y[to + j] = (p[to + j] + p[2 * step + to + j]) + sums[j];
          }
        }
    }
}

}  // namespace qmir
