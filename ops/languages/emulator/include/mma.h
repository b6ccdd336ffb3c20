#error "the emulator has no mma.h: its kernels run on a GPU only"
