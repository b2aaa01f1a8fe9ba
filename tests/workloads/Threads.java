// 24 threads that check what they own and what they share, and make garbage, until there is a file `end`.

import java.nio.file.*;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.*;
import java.util.concurrent.locks.ReentrantLock;

public class Threads {
    static final int THREADS = 24;
    static final int LONGS = 40_000;
    static volatile boolean end;
    static final ReentrantLock lock = new ReentrantLock();
    static long counted;
    static final AtomicLong atomic = new AtomicLong();
    static final ConcurrentHashMap<Integer, Long> shared = new ConcurrentHashMap<>();
    static final Exchanger<Long> exchanger = new Exchanger<>();

    static void check(boolean right, String what) {
        if (!right) {
            System.out.println("wrong: " + what);
            System.exit(1);
        }
    }

    /** Gives the number of its rounds. */
    static long work(int number) throws Exception {
        long[] data = new long[LONGS];
        Map<Integer, String> map = new HashMap<>();
        SplittableRandom random = new SplittableRandom(number);
        long sum = 0, rounds = 0;
        while (!end) {
            for (int i = 0; i < 2000; i++) {
                int at = random.nextInt(LONGS);
                long value = random.nextLong();
                sum += value - data[at];
                data[at] = value;
            }
            long all = 0;
            for (long value : data) all += value;
            check(all == sum, "sum of thread " + number);
            for (int i = 0; i < 200; i++) {
                int key = random.nextInt(3000);
                String old = map.put(key, "value " + key + " of " + number);
                check(old == null || old.equals("value " + key + " of " + number), "map of thread " + number);
            }
            lock.lock();
            try {
                counted++;
            } finally {
                lock.unlock();
            }
            atomic.incrementAndGet();
            shared.merge(number % 5, 1L, Long::sum);
            rounds++;
            if (rounds % 16 == 0) {
                try {
                    long mine = number;
                    long theirs = exchanger.exchange(mine, 20, TimeUnit.MILLISECONDS);
                    check(theirs >= 0 && theirs < THREADS && theirs != mine, "exchange of thread " + number);
                } catch (TimeoutException alone) {
                    // Nobody else was there.
                }
            }
            Thread.sleep(1 + number % 7);
        }
        return rounds;
    }

    public static void main(String[] arguments) throws Exception {
        ExecutorService threads = Executors.newFixedThreadPool(THREADS);
        List<Future<Long>> results = new ArrayList<>();
        for (int i = 0; i < THREADS; i++) {
            int number = i;
            results.add(threads.submit(() -> work(number)));
        }
        System.out.println("ready");
        while (!Files.exists(Path.of("end"))) {
            Thread.sleep(20);
            for (Future<Long> result : results) check(!result.isDone(), "a thread has ended");
        }
        end = true;
        long rounds = 0;
        for (Future<Long> result : results) rounds += result.get();
        threads.shutdown();
        check(threads.awaitTermination(60, TimeUnit.SECONDS), "the end of all threads");
        long merged = 0;
        for (long value : shared.values()) merged += value;
        check(counted == rounds && atomic.get() == rounds && merged == rounds, "what was counted");
        System.out.println("pass");
    }
}
