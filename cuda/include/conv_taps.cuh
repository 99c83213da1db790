// Which taps of a convolution lie inside the image, along one axis. Output positions that see the
// same taps form a class; classes are numbered in the order of the positions.
#pragma once
#include "common.cuh"

namespace qmir {

template <class Int>
struct TapRange {
  Int first, last;  // one behind the last
};

// Of an output position whose first tap lies at `origin`.
template <class Int>
QMIR_FN TapRange<Int> taps_inside(Int origin, Int dilation, Int kernel, Int size) {
  // Kernel positions before a distance from the first one.
  const auto before = [=](Int distance) {
    return distance <= 0 ? (Int)0 : min_of<Int>(kernel, (distance + dilation - 1) / dilation);
  };
  const Int last = before(size - origin);
  return {min_of(last, before(-origin)), last};
}

struct ConvAxis {
  int size, out, kernel, stride, pad, dilation;

  QMIR_FN TapRange<int> inside(int position) const {
    return taps_inside(position * stride - pad, dilation, kernel, size);
  }

  // Neither end of the range grows with the position: their sum falls by what the class rises.
  QMIR_FN int fallen(const TapRange<int>& range) const {
    const TapRange<int> first = inside(0);
    return first.first + first.last - range.first - range.last;
  }

  QMIR_FN int class_of(int position) const {
    // Where all taps lie inside, as nearly everywhere, without a division.
    const int origin = position * stride - pad;
    const bool whole = origin >= 0 && origin + (kernel - 1) * dilation < size;
    return fallen(whole ? TapRange<int>{0, kernel} : inside(position));
  }

  // The first position of a class; a class may have none, then that of the next one.
  QMIR_FN int first_of(int index) const {
    int low = 0, high = out - 1;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (class_of(middle) < index)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

}  // namespace qmir
