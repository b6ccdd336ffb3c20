#error "the emulator has no cooperative_groups.h: its kernels run on a GPU only"
